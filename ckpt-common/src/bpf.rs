//! What the programs in the kernel share with us: map keys and values, `repr(C)`, no `std`.
