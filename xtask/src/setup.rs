//! `setup`: the Debian packages that tests and demo need.

use crate::command::{as_root, run};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::{Command, Stdio};

/// Packages by what they are for.
const PACKAGES: &[(&str, &[&str])] = &[
    ("test nodes", &["openssh-server", "openssh-client", "iproute2", "procps", "util-linux"]),
    ("workloads", &["gcc", "libc6-dev", "make", "python3", "python3-numpy"]),
    ("workloads", &["libopenblas0-pthread", "redis-server", "redis-tools"]),
    ("workloads", &["openjdk-17-jdk-headless", "nodejs", "golang-go", "stress-ng", "ffmpeg"]),
    ("workloads", &["postgresql", "nginx-light", "wrk", "sqlite3", "xz-utils", "gzip", "coreutils"]),
];

/// Debian's way to keep a package's daemon from being started when it is installed.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Installs what is missing, and says so. No daemon is started, none that runs is touched.
///
/// # Errors
/// apt-get fails, or this is not a Debian machine.
pub(crate) fn packages() -> Result<()> {
    let wanted = PACKAGES.iter().flat_map(|(_, names)| *names).copied();
    let missing: Vec<&str> = wanted.filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: installing {} (Debian packages that the tests and the demo use)", missing.join(" "));
    let policy = DaemonsOff::set()?;
    let update = run(as_root("apt-get").args(["update", "-q"]));
    let mut install = as_root("env");
    install
        .args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "install", "-q", "-y"])
        .arg("--no-install-recommends")
        .args(&missing);
    // Without fresh lists the install may still work: its error is the one that counts.
    let done = run(&mut install).or_else(|error| update.and(Err(error)));
    policy.unset()?;
    done.context("hint: the tests need Debian 12 or newer and its package archive")
}

fn installed(package: &str) -> bool {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output();
    output.is_ok_and(|output| output.stdout == b"installed")
}

/// `policy-rc.d` is in place, and ours.
struct DaemonsOff {
    ours: bool,
}

impl DaemonsOff {
    fn set() -> Result<Self> {
        let ours = !Path::new(POLICY).exists();
        if ours {
            let script = format!("printf '#!/bin/sh\\nexit 101\\n' > {POLICY} && chmod 755 {POLICY}");
            run(as_root("sh").args(["-c", &script]))?;
        }
        Ok(Self { ours })
    }

    fn unset(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if std::mem::take(&mut self.ours) { run(as_root("rm").args(["-f", POLICY])) } else { Ok(()) }
    }
}

impl Drop for DaemonsOff {
    fn drop(&mut self) {
        // The backstop for errors on the way: nothing more can be done about a second one.
        let _ = self.remove();
    }
}
