//! Stores of every format version, as they were written then. They must be read for ever.
//!
//! `CKPT_WRITE_GOLDEN=1 cargo test golden` writes the one of the current version anew; only for a
//! version that was never released.

use super::*;
use ckpt_common::image::{
    objects::MemoryFile,
    process::{
        AddressSpace, AltStack, Backing, Credentials, Descriptor, IntervalTimer, Mapping, Process, Thread,
    },
};
use std::path::{Path, PathBuf};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/format-1")
}

fn memory_file() -> OpenFile {
    let value = MemoryFile {
        name: Some("heap".into()),
        inode: 77,
        size: 5 * PAGE_SIZE as u64,
        seals: 2,
        mode: 0o600,
        position: 3,
        content: MemoryId(9),
    };
    let payload = rmp_serde::to_vec_named(&value).unwrap();
    OpenFile { kind: "memory-file".into(), label: "/memfd:heap (deleted)".into(), payload, ..file(2) }
}

fn process() -> Process {
    let thread = Thread {
        tid: 4242,
        comm: "golden".into(),
        regs: (0..216).collect(),
        xstate: vec![7; 64],
        sigmask: 0x10,
        pending: Vec::new(),
        altstack: AltStack { address: 0x7000, flags: 2, size: 8192 },
        robust_list: (0x7100, 24),
        rseq: None,
        clear_child_tid: 0x7200,
        creds: Credentials {
            uids: [1000; 4],
            gids: [100; 4],
            groups: vec![100, 27],
            caps: [0; 5],
            securebits: 0,
            no_new_privs: true,
        },
        sched: vec![48; 48],
        affinity: vec![3],
        ioprio: 4,
        pdeathsig: 0,
        timer_slack: 50_000,
    };
    let mapping = |start: u64, backing| Mapping {
        start,
        end: start + 0x20_0000,
        prot: 3,
        backing,
        flags: 0,
        advice: vec![14],
        locked: 0,
        huge: false,
    };
    let shared = Backing::SharedFile { file: FileId(2), offset: 0 };
    Process {
        pid: 4242,
        ppid: 1,
        pgid: 4242,
        sid: 4242,
        zombie: None,
        stopped: false,
        subreaper: false,
        exit_signal: 17,
        exe: "/bin/golden".into(),
        cmdline: vec!["golden".into(), "--image".into()],
        umask: 0o22,
        cwd: "/".into(),
        root: "/".into(),
        limits: vec![(7, 1024, 4096)],
        actions: Vec::new(),
        pending: Vec::new(),
        itimers: std::array::from_fn(|_| IntervalTimer { value: 0, interval: 0 }),
        timers: Vec::new(),
        oom_score_adj: 0,
        dumpable: 1,
        thp_disable: false,
        mm: AddressSpace {
            memory: MemoryId(0),
            fields: [0x1000; 11],
            auxv: vec![1; 32],
            exe: FileId(1),
            mappings: vec![mapping(0x10_0000, Backing::Anonymous), mapping(0x80_0000, shared)],
            vdso: vec![0x7f; 16],
        },
        threads: vec![thread],
        fds: vec![Descriptor { fd: 3, cloexec: true, file: FileId(2) }],
    }
}

/// What the two checkpoints hold: in the second, some pages are other ones.
fn contents() -> [Memory; 2] {
    let mut dense: BTreeMap<_, _> = (0x100..0x118).map(|n| (n, page(1, n))).collect();
    dense.insert(0x120, page(2, 1));
    dense.insert(0x121, page(0, 0));
    let shared = (0..5).map(|n| (n, page(n as u8, n))).collect();
    let first = Memory::from([(0, dense), (3, BTreeMap::new()), (9, shared)]);
    let mut second = first.clone();
    let changed = second.get_mut(&0).unwrap();
    changed.insert(0x104, page(1, 99));
    changed.remove(&0x117);
    [first, second]
}

fn write_golden() {
    let _ = fs::remove_dir_all(directory());
    let store = Store::create(&directory()).unwrap();
    let [first, second] = contents();
    let mut base: Option<(Checkpoint, PartReader)> = None;
    for memory in [&first, &second] {
        let dump = store.begin_dump(&job("golden")).unwrap();
        let options = PartOptions {
            dump: Some(dump.id().clone()),
            base: base.as_ref().map(|(_, part)| part.clone()),
            ..Default::default()
        };
        let mut part = store.part_writer(options).unwrap();
        part.record(&process()).unwrap();
        part.record(&file(1)).unwrap();
        part.record(&memory_file()).unwrap();
        for (&id, pages) in memory {
            part.memory(MemoryId(id)).unwrap();
            for (&number, content) in pages {
                match &base {
                    Some((_, base)) if id == 0 && first[&0].get(&number) == Some(content) => {
                        let runs = pages::slice(base.page_map(MemoryId(0)).unwrap(), number, number + 1);
                        part.inherit(MemoryId(0), base, &runs.collect::<Vec<_>>()).unwrap();
                    }
                    _ => part.pages(MemoryId(id), number, content).unwrap(),
                }
            }
        }
        let part = part.finish().unwrap();
        let mut manifest = manifest(part.clone());
        manifest.created = 1_795_454_591;
        manifest.nodes[0].base =
            base.as_ref().map(|(checkpoint, _)| BaseRef { name: checkpoint.name(), id: checkpoint.id });
        let checkpoint = dump.commit(manifest).unwrap();
        base = Some((checkpoint, store.open_part(&part).unwrap()));
    }
    for lock in ["lock", "jobs/golden/lock"] {
        fs::remove_file(directory().join(lock)).unwrap();
    }
}

#[test]
fn the_golden_store_of_format_1_is_read() {
    if std::env::var_os("CKPT_WRITE_GOLDEN").is_some() {
        write_golden();
    }
    let store = Store::open(&directory()).unwrap();
    let checkpoints = store.checkpoints(&job("golden")).unwrap();
    assert_eq!(checkpoints.len(), 2);
    for (checkpoint, memory) in checkpoints.iter().zip(contents()) {
        assert_eq!(store.verify(checkpoint, 100).problems, []);
        let part = &checkpoint.manifest.nodes[0].part;
        assert!(read(&store, part).unwrap() == memory);
        let part = store.open_part(part).unwrap();
        assert_eq!(part.read::<Process>().unwrap(), [process()]);
        assert_eq!(part.read::<OpenFile>().unwrap(), [file(1), memory_file()]);
    }
    let [first, second] = [&checkpoints[0], &checkpoints[1]].map(|checkpoint| &checkpoint.manifest.nodes[0]);
    assert_eq!((first.base.as_ref(), first.part.inherited_pages), (None, 0));
    assert_eq!(second.base.as_ref().map(|base| base.name.as_str()), Some("golden@1"));
    assert!(second.part.inherited_pages > 20);
}
