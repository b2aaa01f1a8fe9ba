//! Development aid.
use ckpt_cli::{capture, rebuild, store};
fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let a: Vec<String> = std::env::args().collect();
    let dir = std::path::Path::new(&a[2]);
    match a[1].as_str() {
        "dump" => {
            let store = store::Store::create(dir)?;
            let pid: i32 = a[3].parse()?;
            let kill = a.get(4).is_some_and(|s| s == "stop");
            let mut s =
                capture::Session::plan(&[pid], capture::Options { stop: kill, ..Default::default() })?;
            for b in &s.found().blockers {
                eprintln!("blocker {b:?}");
            }
            s.arm()?;
            let r = s.cut()?;
            eprintln!("{r:?}");
            let pos = s.settle()?;
            std::fs::write(
                dir.join("pos.json"),
                serde_json::to_vec(&pos.iter().filter_map(|c| c.position).collect::<Vec<_>>())?,
            )?;
            if !kill {
                s.thaw()?;
            }
            let mut part = store.part_writer(store::PartOptions::default())?;
            s.save(&mut part)?;
            let r = part.finish()?;
            s.finish(if kill { capture::Outcome::Kill } else { capture::Outcome::LeaveRunning })?;
            std::fs::write(dir.join("ref.json"), serde_json::to_vec(&r)?)?;
        }
        _ => {
            let store = store::Store::open(dir)?;
            let r = serde_json::from_slice(&std::fs::read(dir.join("ref.json"))?)?;
            let part = store.open_part(&r)?;
            let mut s = rebuild::Session::plan(
                part,
                rebuild::Options {
                    stdio: rebuild::Stdio::Inherit,
                    pids: if std::env::var_os("NS").is_some() {
                        rebuild::Pids::Namespace
                    } else {
                        rebuild::Pids::Auto
                    },
                    ..Default::default()
                },
            )?;
            for b in s.obstacles() {
                eprintln!("obstacle {b:?}");
            }
            let t = std::time::Instant::now();
            s.build(&rebuild::Network {
                peers: serde_json::from_slice(&std::fs::read(dir.join("pos.json"))?)?,
                ..Default::default()
            })?;
            s.connect()?;
            eprintln!("built {:?}", t.elapsed());
            eprintln!("released {:?}", s.release()?);
            if std::env::var_os("NS").is_some() {
                eprintln!("{:?}", nix::sys::wait::wait());
            }
        }
    }
    Ok(())
}
