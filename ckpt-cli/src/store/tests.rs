//! The store as a whole: round trips, commit and abort, dead dumps, damage.

use super::*;
use ckpt_common::image::{
    MemoryId, PAGE_SIZE,
    file::{FileId, OpenFile},
    manifest::{BaseRef, Checkpoint, Manifest, NodePart, PartRef},
    pages,
    record::RawRecord,
};
use proptest::prelude::*;
use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt};
use tempfile::TempDir;

mod golden;
mod prune;

type Memory = BTreeMap<u32, BTreeMap<u64, Vec<u8>>>;

fn new_store() -> (TempDir, Store) {
    let directory = TempDir::new().unwrap();
    let store = Store::create(&directory.path().join("store")).unwrap();
    (directory, store)
}

fn job(name: &str) -> JobName {
    name.parse().unwrap()
}

fn file(id: u32) -> OpenFile {
    OpenFile {
        id: FileId(id),
        flags: 0,
        owner: (0, 0, 0),
        label: "pipe:[1]".into(),
        kind: "pipe".into(),
        version: 1,
        payload: vec![id as u8; 100],
    }
}

/// A page of one of several kinds: zeros, compressible, not compressible.
fn page(kind: u8, seed: u64) -> Vec<u8> {
    match kind % 3 {
        0 => vec![0; PAGE_SIZE],
        1 => (0..PAGE_SIZE).map(|i| (i / 64) as u8 ^ seed as u8).collect(),
        _ => {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&seed.to_le_bytes());
            let mut page = vec![0; PAGE_SIZE];
            hasher.finalize_xof().fill(&mut page);
            page
        }
    }
}

fn memory(objects: u32, pages: u64) -> Memory {
    let object = |id: u32| (0..pages).map(move |n| (n * 3 / 2, page((n + u64::from(id)) as u8, n))).collect();
    (0..objects).map(|id| (id * 7, object(id))).collect()
}

fn write(store: &Store, options: PartOptions, memory: &Memory) -> PartRef {
    let mut part = store.part_writer(options).unwrap();
    part.record(&file(1)).unwrap();
    part.record(&file(2)).unwrap();
    for (&id, pages) in memory {
        part.memory(MemoryId(id)).unwrap();
        for (&number, content) in pages {
            part.pages(MemoryId(id), number, content).unwrap();
        }
    }
    part.finish().unwrap()
}

fn read(store: &Store, part: &PartRef) -> Result<Memory> {
    let part = store.open_part(part)?;
    part.check_known()?;
    let mut memory = Memory::new();
    for id in part.memories() {
        memory.insert(id.0, part.contents(id)?);
    }
    Ok(memory)
}

fn commit(store: &Store, name: &str, memory: &Memory) -> Checkpoint {
    let dump = store.begin_dump(&job(name)).unwrap();
    let options = PartOptions { dump: Some(dump.id().clone()), ..Default::default() };
    let part = write(store, options, memory);
    dump.commit(manifest(part)).unwrap()
}

fn manifest(part: PartRef) -> Manifest {
    let node = NodePart { name: "node1".into(), kernel: "6.18".into(), part, ..Default::default() };
    Manifest { nodes: vec![node], ..Default::default() }
}

fn files_in(store: &Store, directory: &str) -> usize {
    fs::read_dir(store.root().join(directory)).unwrap().count()
}

#[test]
fn what_was_written_is_read() {
    let (_directory, store) = new_store();
    for compress in [Compress::None, Compress::Zstd(1)] {
        let memory = memory(3, 700);
        let part = write(&store, PartOptions { compress, ..Default::default() }, &memory);
        assert!(read(&store, &part).unwrap() == memory);
        let pages = memory.values().flat_map(BTreeMap::values);
        let zero = pages.filter(|page| page.iter().all(|&byte| byte == 0)).count() as u64;
        assert_eq!((part.zero_pages, part.data_pages), (zero, 2100 - zero));
        let records = store.open_part(&part).unwrap().read::<OpenFile>().unwrap();
        assert_eq!(records, [file(1), file(2)]);
    }
    assert_eq!(files_in(&store, "tmp"), 0);
}

#[test]
fn compression_makes_smaller_and_incompressible_chunks_are_plain() {
    let (_directory, store) = new_store();
    let object = |kind| Memory::from([(0, (0..64).map(|n| (n, page(kind, n))).collect())]);
    let stored = |compress, kind| {
        write(&store, PartOptions { compress, ..Default::default() }, &object(kind))
            .packs
            .iter()
            .map(|p| p.bytes)
            .sum::<u64>()
    };
    assert!(stored(Compress::Zstd(1), 1) < 64 * PAGE_SIZE as u64 / 10);
    assert_eq!(stored(Compress::Zstd(1), 2), stored(Compress::None, 2));
    assert_eq!(stored(Compress::Zstd(1), 0), 0);
}

#[test]
fn an_object_without_pages_is_not_a_missing_one() {
    let (_directory, store) = new_store();
    let part = write(&store, PartOptions::default(), &Memory::from([(4, BTreeMap::new())]));
    let part = store.open_part(&part).unwrap();
    assert_eq!(part.memories(), [MemoryId(4)]);
    assert!(part.page_map(MemoryId(4)).unwrap().is_empty());
    let error = part.page_map(MemoryId(5)).unwrap_err().to_string();
    assert!(error.ends_with("part is damaged: memory object 5 is missing"), "{error}");
}

#[test]
fn mistakes_of_the_writer_are_refused() {
    let (_directory, store) = new_store();
    let mut part = store.part_writer(PartOptions::default()).unwrap();
    let id = MemoryId(1);
    assert!(part.pages(id, 0, &page(1, 1)).is_err());
    assert!(part.zero_pages(id, 0, 1).is_err());
    part.memory(id).unwrap();
    part.pages(id, 5, &page(1, 1)).unwrap();
    assert!(part.pages(id, 6, &[1; 100]).is_err());
    assert!(part.pages(id, (1 << 52) - 1, &[1; 2 * PAGE_SIZE]).is_err());
    assert!(part.zero_pages(id, 1 << 52, 1).is_err());
    part.share(id, 7, 1, id, 8).unwrap();
    assert!(part.memory(MemoryId(1)).is_err());
    let error = part.finish().unwrap_err().to_string();
    assert!(error.ends_with("memory object 1 has no page 0x8 to share"), "{error}");
}

#[test]
fn nothing_is_visible_before_the_commit_and_nothing_stays_of_an_abort() {
    let (_directory, store) = new_store();
    let dump = store.begin_dump(&job("shop")).unwrap();
    let options = PartOptions { dump: Some(dump.id().clone()), ..Default::default() };
    let finished = write(&store, options.clone(), &memory(1, 40));
    let mut unfinished = store.part_writer(options).unwrap();
    unfinished.memory(MemoryId(0)).unwrap();
    unfinished.pages(MemoryId(0), 0, &page(2, 0).repeat(40)).unwrap();
    assert_eq!(store.jobs().unwrap(), []);
    assert!(matches!(store.begin_dump(&job("shop")), Err(StoreError::Locked { .. })));
    store.begin_dump(&job("other")).unwrap();
    drop(dump);
    assert!(unfinished.finish().is_err());
    assert_eq!([files_in(&store, "tmp"), files_in(&store, "parts"), files_in(&store, "packs")], [0, 0, 0]);
    assert!(matches!(store.open_part(&finished), Err(StoreError::Missing { .. })));
    assert_eq!(commit(&store, "shop", &memory(1, 40)).name(), "shop@1");
}

#[test]
fn a_writer_can_be_handed_to_another_thread() {
    fn sendable<T: Send>() {}
    sendable::<PartWriter>();
}

#[test]
fn a_cancelled_writer_stops() {
    let (_directory, store) = new_store();
    let options = PartOptions::default();
    let watch = options.watch.clone();
    let mut part = store.part_writer(options).unwrap();
    part.memory(MemoryId(0)).unwrap();
    part.pages(MemoryId(0), 0, &page(2, 0)).unwrap();
    assert_eq!(watch.bytes(), PAGE_SIZE as u64);
    watch.cancel();
    assert!(matches!(part.pages(MemoryId(0), 1, &page(2, 0)), Err(StoreError::Cancelled)));
    assert!(matches!(part.finish(), Err(StoreError::Cancelled)));
    assert_eq!(files_in(&store, "tmp"), 0);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let (_directory, store) = new_store();
    let dump = store.begin_dump(&job("shop")).unwrap();
    let mut part =
        store.part_writer(PartOptions { dump: Some(dump.id().clone()), ..Default::default() }).unwrap();
    part.memory(MemoryId(0)).unwrap();
    part.pages(MemoryId(0), 0, &page(2, 0).repeat(400)).unwrap();
    drop(part);
    assert_eq!(fs::read_dir(store.dump_directory(dump.id()).unwrap()).unwrap().count(), 0);
}

#[test]
fn the_next_dump_sweeps_what_a_dead_one_left_and_only_that() {
    let (_directory, store) = new_store();
    let kept = commit(&store, "shop", &memory(1, 40));
    // Killed after its part was durable: its lock is free, nothing else was cleaned up.
    let killed = store.begin_dump(&job("shop")).unwrap();
    let options = PartOptions { dump: Some(killed.id().clone()), ..Default::default() };
    write(&store, options, &memory(1, 40));
    let living = store.begin_dump(&job("living")).unwrap();
    let options = PartOptions { dump: Some(living.id().clone()), ..Default::default() };
    let part = write(&store, options, &memory(2, 40));
    assert_eq!(files_in(&store, "parts"), 3);
    killed.kill();
    drop(store.begin_dump(&job("third")).unwrap());
    assert_eq!(files_in(&store, "parts"), 2);
    let living = living.commit(manifest(part)).unwrap();
    for checkpoint in [kept, living] {
        assert_eq!(store.verify(&checkpoint, 100).problems, []);
    }
    assert_eq!(files_in(&store, "tmp"), 0);
}

#[test]
fn a_dump_killed_right_after_its_commit_is_not_swept() {
    let (_directory, store) = new_store();
    let dump = store.begin_dump(&job("shop")).unwrap();
    let options = PartOptions { dump: Some(dump.id().clone()), ..Default::default() };
    let mut manifest = manifest(write(&store, options, &memory(1, 40)));
    (manifest.job, manifest.number, manifest.dump) = ("shop".into(), 1, dump.id().as_str().into());
    fs::write(store.root().join("jobs/shop/1.json"), manifest.encode().unwrap().0).unwrap();
    dump.kill();
    drop(store.begin_dump(&job("other")).unwrap());
    assert_eq!(files_in(&store, "tmp"), 0);
    let checkpoint = store.resolve("shop").unwrap();
    assert_eq!(store.verify(&checkpoint, 100).problems, []);
}

#[test]
fn checkpoints_are_found_by_every_name_they_have() {
    let (_directory, store) = new_store();
    let first = commit(&store, "shop", &memory(1, 4));
    let second = commit(&store, "shop", &memory(1, 4));
    for name in ["shop", "shop@2", "shop@latest", &second.id.to_string()[..12]] {
        assert_eq!(store.resolve(name).unwrap(), second, "{name}");
    }
    assert_eq!(store.resolve("shop@1").unwrap(), first);
    assert_eq!(store.jobs().unwrap(), [job("shop")]);
    for name in ["shop@3", "shop@x", "nothing", "", "../shop", "0000"] {
        assert!(matches!(store.resolve(name), Err(StoreError::NotFound { .. })), "{name}");
    }
    for name in ["", "a/b", "..", "-x", "a b"] {
        assert!(name.parse::<JobName>().is_err(), "{name}");
    }
}

#[test]
fn a_directory_with_other_files_does_not_become_a_store() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("thesis.tex"), "x").unwrap();
    assert!(matches!(Store::create(directory.path()), Err(StoreError::NoStore { .. })));
    assert!(matches!(Store::open(directory.path()), Err(StoreError::NoStore { .. })));
    let (_directory, store) = new_store();
    fs::write(store.root().join("version"), "ckpt store 2\n").unwrap();
    let error = Store::open(store.root()).unwrap_err().to_string();
    assert!(error.contains("store has version 2, but this ckpt reads only up to version 1"), "{error}");
}

#[test]
fn only_the_owner_can_read() {
    let (_directory, store) = new_store();
    commit(&store, "shop", &memory(1, 40));
    let mut todo = vec![store.root().to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::metadata(&path).unwrap();
        let mode = if meta.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{}", path.display());
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

#[test]
fn unknown_required_records_are_named() {
    let (_directory, store) = new_store();
    let dump = store.begin_dump(&job("shop")).unwrap();
    let options = PartOptions { dump: Some(dump.id().clone()), ..Default::default() };
    let mut part = store.part_writer(options).unwrap();
    let record = RawRecord { kind: "hologram", version: 1, required: true, payload: &[] };
    part.raw_record(&record).unwrap();
    let part = part.finish().unwrap();
    let error = store.open_part(&part).unwrap().check_known().unwrap_err().to_string();
    assert!(error.contains("unknown kind `hologram`"), "{error}");
    let checkpoint = dump.commit(manifest(part)).unwrap();
    assert_eq!(store.verify(&checkpoint, 100).problems.len(), 1);
}

/// Every file of a checkpoint, damaged in many places, one after the other: reading must give an
/// error or what was written, and `verify` must always complain.
#[test]
fn damage_is_always_found() {
    let (_directory, store) = new_store();
    let memory = memory(2, 100);
    let checkpoint = commit(&store, "shop", &memory);
    let node = &checkpoint.manifest.nodes[0];
    let paths = [
        store.part_path(node.part.id),
        store.pack_path(node.part.packs[0].id),
        store.root().join("jobs/shop/1.json"),
    ];
    let check = |what: String| {
        let resolved = store.resolve("shop@1");
        let problems = match &resolved {
            Ok(checkpoint) => store.verify(checkpoint, 100).problems,
            Err(StoreError::Damaged { .. } | StoreError::NotFound { .. }) => return,
            Err(error) => panic!("{what}: {error}"),
        };
        assert_ne!(problems, [], "{what}");
        match read(&store, &node.part) {
            Ok(found) => assert!(found == memory, "{what}: wrong content"),
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => {}
            Err(error) => panic!("{what}: {error}"),
        }
    };
    for path in paths {
        let good = fs::read(&path).unwrap();
        // Ends completely, the middle in steps: headers, tables, indexes, chunks, records, maps.
        let positions = (0..good.len()).filter(|&n| n < 200 || n + 300 > good.len() || n % 397 == 0);
        for position in positions {
            let mut bad = good.clone();
            bad[position] ^= 1 << (position % 8);
            fs::write(&path, &bad).unwrap();
            check(format!("{}: byte {position} flipped", path.display()));
        }
        for length in [0, 1, 31, 50, good.len() / 2, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            check(format!("{}: cut at {length}", path.display()));
        }
        fs::write(&path, [&good[..], &good[..]].concat()).unwrap();
        check(format!("{}: doubled", path.display()));
        fs::remove_file(&path).unwrap();
        check(format!("{}: removed", path.display()));
        fs::write(&path, &good).unwrap();
    }
    assert_eq!(store.verify(&store.resolve("shop@1").unwrap(), 100).problems, []);
}

#[test]
fn verify_reads_as_much_as_it_was_asked_to() {
    let (_directory, store) = new_store();
    let checkpoint = commit(&store, "shop", &memory(1, 2400));
    let all = store.verify(&checkpoint, 100);
    let pages = checkpoint.manifest.nodes[0].part.data_pages;
    assert_eq!(all.bytes, pages * PAGE_SIZE as u64);
    assert!(all.chunks >= 100);
    assert_eq!(store.verify(&checkpoint, 10).chunks, all.chunks.div_ceil(10));
}

#[test]
fn equal_content_is_stored_once() {
    let (_directory, store) = new_store();
    let object: BTreeMap<_, _> = (0..64).map(|n| (n, page(2, n))).collect();
    let moved = object.iter().map(|(n, content)| (n + 160, content.clone())).collect();
    let memory = Memory::from([(0, object), (1, moved)]);
    let part = write(&store, PartOptions::default(), &memory);
    assert_eq!((part.data_pages, part.shared_pages), (128, 64));
    let bytes = part.packs[0].bytes;
    assert!((64 * 4096..65 * 4096).contains(&bytes), "{bytes}");
    assert!(read(&store, &part).unwrap() == memory);
}

#[test]
fn a_base_that_is_damaged_is_not_pointed_into() {
    let (_directory, store) = new_store();
    let memory = memory(1, 100);
    let first = write(&store, PartOptions::default(), &memory);
    let base = store.open_part(&first).unwrap();
    let runs = base.page_map(MemoryId(0)).unwrap();
    fs::remove_file(store.pack_path(first.packs[0].id)).unwrap();
    let second = write(&store, PartOptions { base: Some(base.clone()), ..Default::default() }, &memory);
    assert_eq!(second.inherited_pages, 0);
    assert!(read(&store, &second).unwrap() == memory);
    let mut part = store.part_writer(PartOptions::default()).unwrap();
    part.memory(MemoryId(0)).unwrap();
    part.inherit(MemoryId(0), &base, runs).unwrap();
    assert!(matches!(part.finish(), Err(StoreError::Missing { .. })));
}

/// One changed page costs the chunk it is in, not those behind it.
#[test]
fn a_change_is_not_carried_on() {
    let (_directory, store) = new_store();
    // Dense, with holes, and sparse.
    for step in [1, 2, 5, 40] {
        let mut memory = Memory::from([(0, (0..4000).map(|n| (n * step, page(2, n))).collect())]);
        let base = write(&store, PartOptions::default(), &memory);
        let base = Some(store.open_part(&base).unwrap());
        memory.get_mut(&0).unwrap().remove(&(step * 1001));
        memory.get_mut(&0).unwrap().insert(step * 2001, page(2, 1 << 40));
        let second = write(&store, PartOptions { base, ..Default::default() }, &memory);
        let written = second.data_pages - second.inherited_pages;
        assert!(written <= 150, "every {step}. page: {written} pages written");
        assert!(read(&store, &second).unwrap() == memory);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Pages in any order, given again, shared and inherited, against a model; twice, so that the
    /// second part has a base.
    #[test]
    fn any_order_of_calls_gives_what_was_said_last(
        steps in proptest::collection::vec((0u32..3, 0u64..200, 1u64..40, 0u8..9), 1..60),
    ) {
        let (_directory, store) = new_store();
        let mut base: Option<(PartReader, Memory)> = None;
        for round in 0..2 {
            let mut part = store.part_writer(PartOptions::default()).unwrap();
            let (mut said, mut inherited) = (Memory::new(), Memory::new());
            let mut gone = std::collections::BTreeSet::new();
            for id in 0..4 {
                part.memory(MemoryId(id)).unwrap();
                said.insert(id, BTreeMap::new());
            }
            // The source of all that is shared.
            for n in 0..300 {
                part.pages(MemoryId(3), n, &page(n as u8, n + round)).unwrap();
                said.get_mut(&3).unwrap().insert(n, page(n as u8, n + round));
            }
            for (number, &(id, first, count, kind)) in (round..).zip(&steps) {
                let pages = first..first + count;
                let object = said.get_mut(&id).unwrap();
                match kind {
                    0..=3 => {
                        let content: Vec<_> = pages.clone().map(|n| page((n as u8 >> 4) ^ kind, n ^ number)).collect();
                        part.pages(MemoryId(id), first, &content.concat()).unwrap();
                        object.extend(pages.zip(content));
                    }
                    4 => {
                        part.zero_pages(MemoryId(id), first, count as u32).unwrap();
                        object.extend(pages.map(|n| (n, vec![0; PAGE_SIZE])));
                    }
                    5 => {
                        part.share(MemoryId(id), first, count as u32, MemoryId(3), first + 7).unwrap();
                        let source = said[&3].clone();
                        said.get_mut(&id).unwrap().extend(pages.map(|n| (n, source[&(n + 7)].clone())));
                    }
                    6 => {
                        part.absent(MemoryId(id), first, count as u32).unwrap();
                        object.retain(|n, _| !pages.contains(n));
                        gone.extend((first..first + count).map(|n| (id, n)));
                    }
                    _ => {
                        let Some((base, pages_of_base)) = &base else { continue };
                        let map = base.page_map(MemoryId(id)).unwrap();
                        let runs: Vec<_> = pages::slice(map, first, first + count).collect();
                        part.inherit(MemoryId(id), base, &runs).unwrap();
                        let old = pages_of_base[&id].range(pages).map(|(&n, content)| (n, content.clone()));
                        inherited.entry(id).or_default().extend(old);
                    }
                }
            }
            for (id, object) in inherited {
                let said = said.get_mut(&id).unwrap();
                for (n, content) in object.into_iter().filter(|(n, _)| !gone.contains(&(id, *n))) {
                    said.entry(n).or_insert(content);
                }
            }
            let part = part.finish().unwrap();
            prop_assert!(read(&store, &part).unwrap() == said);
            let zero = said.values().flat_map(BTreeMap::values).filter(|page| page.iter().all(|&b| b == 0)).count();
            let all: usize = said.values().map(BTreeMap::len).sum();
            prop_assert_eq!((part.data_pages + part.zero_pages, part.zero_pages), (all as u64, zero as u64));
            base = Some((store.open_part(&part).unwrap(), said));
        }
    }

    /// What has not changed is not written again, however the calls are cut.
    #[test]
    fn the_same_content_costs_nothing_the_second_time(
        objects in proptest::collection::btree_map(0u32..9, proptest::collection::btree_map(
            0u64..300, (any::<u8>(), 0u64..5).prop_map(|(kind, seed)| page(kind, seed)), 0..200), 1..4),
        most in 1usize..50,
    ) {
        let (_directory, store) = new_store();
        let first = write(&store, PartOptions::default(), &objects);
        let base = Some(store.open_part(&first).unwrap());
        let mut part = store.part_writer(PartOptions { base, ..Default::default() }).unwrap();
        for (&id, pages) in &objects {
            part.memory(MemoryId(id)).unwrap();
            let pages: Vec<_> = pages.iter().collect();
            for run in pages.chunk_by(|a, b| a.0 + 1 == *b.0).flat_map(|run| run.chunks(most)) {
                let content: Vec<_> = run.iter().flat_map(|(_, content)| content.iter().copied()).collect();
                part.pages(MemoryId(id), *run[0].0, &content).unwrap();
            }
        }
        let second = part.finish().unwrap();
        prop_assert_eq!(second.packs.len(), 0);
        prop_assert_eq!((second.data_pages, second.inherited_pages), (first.data_pages, first.data_pages));
        prop_assert!(read(&store, &second).unwrap() == objects);
    }

    /// Page by page, against the pages themselves.
    #[test]
    fn differences_are_those_of_the_pages(
        first in proptest::collection::btree_map(
            0u64..120, (any::<u8>(), 0u64..3).prop_map(|(kind, seed)| page(kind, seed)), 0..90),
        second in proptest::collection::btree_map(
            0u64..120, (any::<u8>(), 0u64..3).prop_map(|(kind, seed)| page(kind, seed)), 0..90),
        with_base: bool,
    ) {
        let (_directory, store) = new_store();
        let open = |part| store.open_part(&part).unwrap();
        let old = open(write(&store, PartOptions::default(), &Memory::from([(0, first.clone())])));
        let base = with_base.then(|| old.clone());
        let new = PartOptions { base, compress: Compress::Zstd(3), ..Default::default() };
        let new = open(write(&store, new, &Memory::from([(0, second.clone())])));
        let mut wanted = PageDiff::default();
        for number in 0..120 {
            match (first.get(&number), second.get(&number)) {
                (None, None) => {}
                (Some(_), None) => wanted.removed += 1,
                (None, Some(_)) => wanted.added += 1,
                (Some(a), Some(b)) if a == b => wanted.same += 1,
                _ => wanted.changed += 1,
            }
        }
        let (a, b) = ((&old, MemoryId(0)), (&new, MemoryId(0)));
        prop_assert_eq!(compare_pages(Some(a), Some(b)).unwrap(), wanted);
        let all = PageDiff { removed: first.len() as u64, ..Default::default() };
        prop_assert_eq!(compare_pages(Some(a), None).unwrap(), all);
        let none = PageDiff { same: first.len() as u64, ..Default::default() };
        prop_assert_eq!(compare_pages(Some(a), Some(a)).unwrap(), none);
        prop_assert_eq!(stored_anew(&[&old], &[&old]).unwrap(), 0);
        let data = new.page_map(MemoryId(0)).unwrap().iter().any(|run| run.source() != pages::Source::Zero);
        prop_assert_eq!(stored_anew(&[], &[&new]).unwrap() > 0, data);
    }

    #[test]
    fn any_memory_round_trips(
        objects in proptest::collection::btree_map(0u32..9, proptest::collection::btree_map(
            0u64..400, (any::<u8>(), 0u64..5).prop_map(|(kind, seed)| page(kind, seed)), 0..90), 0..4),
    ) {
        let (_directory, store) = new_store();
        let part = write(&store, PartOptions::default(), &objects);
        prop_assert!(read(&store, &part).unwrap() == objects);
    }
}
