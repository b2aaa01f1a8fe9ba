//! The programs of ckpt that run in the kernel, as `cargo xtask build-ebpf` has built them.

use anyhow::{Context, Result, anyhow};
use aya::programs::ProgramError;
use aya::{Btf, BtfError, Ebpf, EbpfError, EbpfLoader};
use std::sync::OnceLock;

static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../ckpt-ebpf/prebuilt/ckpt.bpf.o");

/// Makes the maps, with the sizes that are given by name, and loads no program yet.
///
/// # Errors
/// No privilege (CAP_BPF), or no memory.
pub fn load(sizes: &[(&str, u32)]) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for (name, entries) in sizes {
        loader.map_max_entries(name, *entries);
    }
    loader.load(OBJECT).map_err(hint).context("load the BPF object")
}

/// Types of the running kernel, read once: that takes longer than anything else here.
///
/// # Errors
/// The kernel does not give them (CONFIG_DEBUG_INFO_BTF).
pub fn kernel_types() -> Result<&'static Btf> {
    static TYPES: OnceLock<Result<Btf, BtfError>> = OnceLock::new();
    let types = TYPES.get_or_init(Btf::from_sys_fs).as_ref();
    types.map_err(|error| anyhow!("{error}")).context("types of the kernel (/sys/kernel/btf/vmlinux)")
}

/// Adds what to do to the commonest failures.
fn hint(error: EbpfError) -> anyhow::Error {
    let text = match &error {
        EbpfError::MapError(aya::maps::MapError::CreateError { io_error, .. }) => io_error.raw_os_error(),
        EbpfError::ProgramError(ProgramError::LoadError { io_error, .. }) => io_error.raw_os_error(),
        _ => None,
    };
    match text {
        Some(libc::EPERM) => {
            anyhow!(error).context("BPF is not allowed\nhint: CAP_BPF and CAP_NET_ADMIN are needed")
        }
        _ => anyhow!(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_is_there() {
        assert_eq!(&OBJECT[..4], b"\x7fELF");
    }
}
