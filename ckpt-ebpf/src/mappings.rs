//! The mappings of a process, as the kernel itself keeps them: for each, the beginning of its `struct vm_area_struct`.

use aya_ebpf::bindings::seq_file;
use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_seq_write};
use ckpt_common::bpf::MappingWords;
use core::ffi::c_void;

/// `struct bpf_iter__task_vma` (kernel/bpf/task_iter.c).
#[repr(C)]
pub struct Context {
    /// `struct bpf_iter_meta`, which begins with the file that is read.
    meta: *const *mut seq_file,
    _task: *const c_void,
    /// Null at the end.
    mapping: *const c_void,
}

/// Writes a [`MappingWords`] for each mapping into the file.
#[unsafe(link_section = "iter/task_vma")]
#[unsafe(no_mangle)]
pub extern "C" fn mappings(context: *const Context) -> i32 {
    // SAFETY: the kernel calls it with such a context; the verifier checks what is read from where.
    unsafe {
        let (meta, mapping) = ((*context).meta, (*context).mapping);
        if mapping.is_null() {
            return 0;
        }
        let mut words = MappingWords::default();
        let size = size_of::<MappingWords>() as u32;
        if bpf_probe_read_kernel((&raw mut words).cast(), size, mapping) == 0 {
            bpf_seq_write(*meta, (&raw const words).cast(), size);
        }
    }
    0
}
