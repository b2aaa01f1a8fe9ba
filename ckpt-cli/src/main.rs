//! The `ckpt` command: parse, run, exit code.

fn main() -> std::process::ExitCode {
    ckpt_cli::commands::main().into()
}
