//! `build-ebpf`: the programs of the kernel, built from Rust without a nightly toolchain.
//!
//! rustup's stable compiler has no BPF target library, and building `core` for it needs nightly
//! features. Debian's `rustc-web` packages bring a compiler with its library sources; they are
//! unpacked into a folder of their own (installing them would replace the system's `rustc`) and
//! used with `RUSTC_BOOTSTRAP`. The result is the same for every folder it is built in, and is
//! committed, so that a plain `cargo build` needs none of this.

use crate::command::{output, repository, run};
use anyhow::{Context, Result, bail};
use object::build::elf::{Builder, SectionData};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Compiler, its target library, the library's sources, and the LLVM it is linked with.
const PACKAGES: [&str; 5] =
    ["rustc-web", "libstd-rust-web-1.96", "libstd-rust-web-dev", "rust-web-src", "libllvm22"];
/// Version of bpf-linker, and the feature that names the LLVM it is used with.
const LINKER: (&str, &str) = ("0.13.0", "llvm-22");
/// Name of the binary in `ckpt-ebpf`.
const BINARY: &str = "ckpt-ebpf";

/// Builds the object and records it under `ckpt-ebpf/prebuilt`, or with `check` compares it with
/// what is recorded there.
///
/// # Errors
/// The toolchain cannot be had, the build fails, or the check finds another object although the
/// versions of the tools are the recorded ones.
pub(crate) fn build(check: bool) -> Result<()> {
    let toolchain = Toolchain::prepare()?;
    let object = toolchain.compile(&repository().join("ckpt-ebpf"))?;
    let versions = toolchain.versions()?;
    let hash = blake3::hash(&object);
    let text = format!("{versions}\n\n{} bytes, blake3 {hash}\n{}\n", object.len(), source_line()?);

    let prebuilt = repository().join("ckpt-ebpf/prebuilt");
    let (object_path, text_path) = (prebuilt.join("ckpt.bpf.o"), prebuilt.join("ckpt.bpf.txt"));
    if !check {
        fs::create_dir_all(&prebuilt)?;
        fs::write(&object_path, &object).with_context(|| format!("write {}", object_path.display()))?;
        fs::write(&text_path, &text).with_context(|| format!("write {}", text_path.display()))?;
        println!("wrote {}\n{text}", object_path.display());
        return Ok(());
    }
    let recorded = fs::read_to_string(&text_path).with_context(|| format!("read {}", text_path.display()))?;
    let committed = fs::read(&object_path).with_context(|| format!("read {}", object_path.display()))?;
    if committed == object {
        println!("the committed object is what the source builds ({} bytes, blake3 {hash})", object.len());
        return Ok(());
    }
    if !recorded.starts_with(&versions) {
        println!("not compared: other tools than the recorded ones\nrecorded: {recorded}\nhere: {text}");
        return Ok(());
    }
    bail!(
        "{} is not what the source builds\nrecorded: {recorded}\nhere: {text}\nhint: run `cargo xtask build-ebpf` and commit the result",
        object_path.display()
    )
}

/// Was the committed object built from the source as it is? Cheap: compares what was recorded, builds nothing.
///
/// # Errors
/// It was built from another source.
pub(crate) fn up_to_date() -> Result<()> {
    let path = repository().join("ckpt-ebpf/prebuilt/ckpt.bpf.txt");
    let recorded = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let object = fs::read(path.with_extension("o")).context("read the committed object")?;
    let hash = blake3::hash(&object).to_string();
    if recorded.contains(&hash) && recorded.lines().any(|line| source_line().is_ok_and(|here| here == line)) {
        return Ok(());
    }
    bail!(
        "ckpt-ebpf/prebuilt/ckpt.bpf.o is not of this source\nhint: run `cargo xtask build-ebpf` and commit the result"
    )
}

/// What the object is made from, as a line in the record.
fn source_line() -> Result<String> {
    let krate = repository().join("ckpt-ebpf");
    let mut files =
        vec![krate.join("Cargo.toml"), krate.join("Cargo.lock"), repository().join("ckpt-common/src/bpf.rs")];
    for entry in fs::read_dir(krate.join("src"))? {
        files.push(entry?.path());
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let data = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        hasher.update(&(data.len() as u64).to_le_bytes()).update(&data);
    }
    Ok(format!("source: blake3 {}", hasher.finalize()))
}

/// The unpacked compiler and the linker.
struct Toolchain {
    folder: PathBuf,
}

impl Toolchain {
    /// Unpacks and builds what is missing, under `$CKPT_EBPF_TOOLCHAIN` or the user's cache.
    fn prepare() -> Result<Self> {
        let home = || env::var_os("HOME").map(PathBuf::from).context("HOME is not set");
        let folder = match (env::var_os("CKPT_EBPF_TOOLCHAIN"), env::var_os("XDG_CACHE_HOME")) {
            (Some(folder), _) => PathBuf::from(folder),
            (None, Some(cache)) => Path::new(&cache).join("ckpt-ebpf-toolchain"),
            (None, None) => home()?.join(".cache/ckpt-ebpf-toolchain"),
        };
        let toolchain = Self { folder };
        toolchain.unpack()?;
        toolchain.linker()?;
        Ok(toolchain)
    }

    fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    fn libraries(&self) -> PathBuf {
        self.root().join("usr/lib/x86_64-linux-gnu")
    }

    /// The compiler behind a script: its libraries are not where the system looks for them.
    fn rustc(&self) -> PathBuf {
        self.folder.join("rustc")
    }

    fn unpack(&self) -> Result<()> {
        if self.rustc().exists() {
            return Ok(());
        }
        eprintln!("downloading and unpacking {} into {}", PACKAGES.join(" "), self.folder.display());
        let packages = self.folder.join("packages");
        fs::create_dir_all(&packages).with_context(|| format!("create {}", packages.display()))?;
        run(Command::new("apt-get").args(["download", "-q"]).args(PACKAGES).current_dir(&packages))?;
        for package in fs::read_dir(&packages)? {
            run(Command::new("dpkg-deb").arg("-x").arg(package?.path()).arg(self.root()))?;
        }
        fs::remove_dir_all(&packages)?;
        let script = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH='{}' exec '{}' \"$@\"\n",
            self.libraries().display(),
            self.root().join("usr/bin/rustc").display()
        );
        let unfinished = self.folder.join("rustc.new");
        fs::write(&unfinished, script)?;
        fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o755))?;
        fs::rename(&unfinished, self.rustc())?;
        Ok(())
    }

    /// bpf-linker from crates.io, linked with any LLVM of the right major version.
    fn linker(&self) -> Result<()> {
        if self.folder.join("bin/bpf-linker").exists() {
            return Ok(());
        }
        eprintln!("building bpf-linker {} (two minutes, once)", LINKER.0);
        let sysroot = PathBuf::from(output(Command::new("rustc").args(["--print", "sysroot"]))?);
        let is_llvm = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libLLVM.so.22"))
        };
        let llvm = fs::read_dir(sysroot.join("lib"))?
            .chain(fs::read_dir(self.libraries())?)
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(is_llvm)
            .context("no libLLVM.so.22 in rustup's toolchain or in the unpacked packages")?;
        // The linker step looks for libLLVM.so, the program later for the name in its run path.
        let prefix = self.folder.join("llvm");
        fs::create_dir_all(prefix.join("lib"))?;
        for name in ["libLLVM.so".as_ref(), llvm.file_name().context("libLLVM has no name")?] {
            let link = prefix.join("lib").join(name);
            let _ = fs::remove_file(&link);
            symlink(&llvm, &link).with_context(|| format!("link {}", link.display()))?;
        }
        run(Command::new("cargo")
            .args(["install", "--quiet", "bpf-linker", "--locked", "--version", LINKER.0])
            .args(["--no-default-features", "--features", LINKER.1, "--root"])
            .arg(&self.folder)
            .env("LLVM_PREFIX", prefix)
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"))
    }

    /// What the bits of the object depend on.
    fn versions(&self) -> Result<String> {
        let rustc = output(Command::new(self.rustc()).arg("-vV"))?;
        let linker = output(Command::new(self.folder.join("bin/bpf-linker")).arg("--version"))?;
        let llvm = fs::read_link(self.folder.join("llvm/lib/libLLVM.so")).context("LLVM of the linker")?;
        let llvm = llvm.file_name().context("LLVM of the linker")?.display().to_string();
        Ok(format!("{rustc}\n{linker}, with {llvm}"))
    }

    fn compile(&self, krate: &Path) -> Result<Vec<u8>> {
        run(Command::new("cargo").args(["fetch", "--quiet", "--locked"]).current_dir(krate))?;
        let target = repository().join("target/ebpf");
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths([self.folder.join("bin")].into_iter().chain(env::split_paths(&path)))?;
        run(Command::new("cargo")
            .args(["build", "--quiet", "--release", "--locked", "-Zbuild-std=core"])
            .args(["--target=bpfel-unknown-none", "--target-dir"])
            .arg(&target)
            .current_dir(krate)
            .env("RUSTC", self.rustc())
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags()?.join("\x1f"))
            .env("PATH", path)
            .env_remove("RUSTUP_TOOLCHAIN"))?;
        let built = target.join("bpfel-unknown-none/release").join(BINARY);
        let data = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
        strip(&data).with_context(|| format!("strip {}", built.display()))
    }

    /// Compiler flags: BTF, instruction set v3, and no path of this machine in the object.
    fn flags(&self) -> Result<Vec<String>> {
        let mut flags: Vec<String> =
            ["--cfg=bpf_target_arch=\"x86_64\"", "-Cdebuginfo=2", "-Ctarget-cpu=v3", "-Clink-arg=--btf"]
                .map(String::from)
                .into();
        let sysroot = PathBuf::from(output(Command::new(self.rustc()).args(["--print", "sysroot"]))?);
        let library = sysroot.join("lib/rustlib/src/rust");
        let mut remap = vec![
            (repository(), "/ckpt"),
            (fs::canonicalize(&library).context("sources of the library")?, "/rust"),
            (library, "/rust"),
        ];
        let cargo_home = match (env::var_os("CARGO_HOME"), env::var_os("HOME")) {
            (Some(folder), _) => PathBuf::from(folder),
            (None, Some(home)) => Path::new(&home).join(".cargo"),
            (None, None) => bail!("neither CARGO_HOME nor HOME is set"),
        };
        for entry in fs::read_dir(cargo_home.join("registry/src")).context("crate sources")? {
            remap.push((entry?.path(), "/crates"));
        }
        flags.extend(remap.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())));
        Ok(flags)
    }
}

/// Drops the DWARF sections: four fifths of the object, and nothing that the kernel reads. BTF stays.
fn strip(data: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(data)?;
    for section in builder.sections.iter_mut() {
        let name = section.name.as_slice();
        section.delete |= name.starts_with(b".debug") || name.starts_with(b".rel.debug");
    }
    // LLVM keeps the section names in .strtab; the writer wants a table of their own for them.
    let names = builder.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}
