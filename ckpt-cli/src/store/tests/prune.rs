//! Pruning: what stays is whole, what goes is gone, whatever happens in between.

use super::{super::prune::Disk, *};
use std::{num::NonZeroUsize, ops::Range, path::Path};

fn keep(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// A checkpoint that saves only what differs from the one before.
fn increment(store: &Store, name: &str, base: Option<&(Checkpoint, Memory)>, memory: &Memory) -> Checkpoint {
    let dump = store.begin_dump(&job(name)).unwrap();
    let options = PartOptions { dump: Some(dump.id().clone()), ..Default::default() };
    let mut part = store.part_writer(options).unwrap();
    let base =
        base.map(|(checkpoint, old)| (store.open_part(&checkpoint.manifest.nodes[0].part).unwrap(), old));
    for (&id, pages) in memory {
        part.memory(MemoryId(id)).unwrap();
        for (&number, content) in pages {
            match &base {
                Some((base, old)) if old.get(&id).and_then(|old| old.get(&number)) == Some(content) => {
                    let map = base.page_map(MemoryId(id)).unwrap();
                    let runs: Vec<_> = pages::slice(map, number, number + 1).collect();
                    part.inherit(MemoryId(id), base, &runs).unwrap();
                }
                _ => part.pages(MemoryId(id), number, content).unwrap(),
            }
        }
    }
    dump.commit(manifest(part.finish().unwrap())).unwrap()
}

/// `count` checkpoints of a job, of which each changes some pages of the one before.
fn chain(store: &Store, name: &str, count: u64) -> Vec<(Checkpoint, Memory)> {
    let mut all: Vec<(Checkpoint, Memory)> = Vec::new();
    let mut memory = Memory::from([
        (0, (0..160).map(|n| (n, page(2, n))).collect()),
        (1, (0..40).map(|n| (3 * n, page(n as u8, n))).collect()),
    ]);
    for round in 0..count {
        for n in 0..60 {
            // Neighbours, and some further off.
            let number = if n < 40 { round * 24 + n } else { n * 41 + round } % 160;
            memory.get_mut(&0).unwrap().insert(number, page(2, 1000 * round + n));
        }
        memory.get_mut(&1).unwrap().remove(&(3 * round));
        let checkpoint = increment(store, name, all.last(), &memory);
        all.push((checkpoint, memory.clone()));
    }
    all
}

fn assert_whole(store: &Store, all: &[(Checkpoint, Memory)]) {
    for (checkpoint, memory) in all {
        assert_eq!(&store.resolve(&checkpoint.name()).unwrap(), checkpoint);
        assert_eq!(store.verify(checkpoint, 100).problems, [], "{}", checkpoint.name());
        assert!(read(store, &checkpoint.manifest.nodes[0].part).unwrap() == *memory);
    }
}

/// Every file with its blocks in bytes.
fn usage(store: &Store) -> BTreeMap<String, u64> {
    use std::os::unix::fs::MetadataExt;
    let mut found = BTreeMap::new();
    for directory in ["parts", "packs", "jobs/shop", "jobs/other"] {
        let Ok(entries) = fs::read_dir(store.root().join(directory)) else { continue };
        for entry in entries {
            let entry = entry.unwrap();
            let name = format!("{directory}/{}", entry.file_name().to_string_lossy());
            found.insert(name, entry.metadata().unwrap().blocks() * 512);
        }
    }
    found
}

#[test]
fn what_only_old_checkpoints_needed_goes() {
    let (_directory, store) = new_store();
    let (shop, other) = (chain(&store, "shop", 5), chain(&store, "other", 3));
    let before = usage(&store);
    let planned = store.prune(None, keep(2), true).unwrap();
    assert_eq!(usage(&store), before);
    let report = store.prune(None, keep(2), false).unwrap();
    assert_eq!(planned, report);
    assert_eq!(report.removed, ["other@1", "shop@1", "shop@2", "shop@3"]);
    assert_eq!((report.kept, report.parts), (4, 4));
    assert!(report.repacked > 0, "{report:?}");
    assert_whole(&store, &[&shop[3..], &other[1..]].concat());
    assert!(matches!(store.resolve("shop@3"), Err(StoreError::NotFound { .. })));
    let after = usage(&store);
    let sum = |usage: &BTreeMap<String, u64>| {
        let files = usage.iter().filter(|(name, _)| name.starts_with('p'));
        files.map(|(_, bytes)| bytes).sum::<u64>()
    };
    assert_eq!(sum(&before) - sum(&after), report.bytes);
    let again = store.prune(None, keep(2), false).unwrap();
    assert_eq!(again, PruneReport { kept: 4, ..Default::default() });
    // The numbers go on, and the next increment can still be taken.
    let memory = shop[4].1.clone();
    let next = increment(&store, "shop", shop.last(), &memory);
    assert_eq!(next.name(), "shop@6");
    assert_eq!(store.prune(Some(&job("shop")), keep(1), false).unwrap().removed, ["shop@4", "shop@5"]);
    assert_whole(&store, &[&[(next, memory)][..], &other[1..]].concat());
    let error = store.prune(Some(&job("nothing")), keep(1), false).unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
}

fn sizes(store: &Store) -> Vec<u64> {
    let mut sizes: Vec<_> = usage(store).into_values().collect();
    sizes.sort_unstable();
    sizes
}

/// Fails at the n-th change of the store, as a `kill -9` there would.
struct Dies(usize);

impl Dies {
    fn step(&mut self) -> Result<()> {
        self.0 = self.0.checked_sub(1).ok_or(StoreError::Cancelled)?;
        Ok(())
    }
}

impl Disk for Dies {
    fn remove(&mut self, path: &Path) -> Result<()> {
        self.step()?;
        super::super::prune::Really.remove(path)
    }

    fn sync(&mut self, directory: &Path) -> Result<()> {
        self.step()?;
        super::super::prune::Really.sync(directory)
    }

    fn free(&mut self, path: &Path, ranges: &[Range<u64>], temporary: &Path) -> Result<()> {
        // Not even all holes are made.
        super::super::holes::punch(path, &ranges[..ranges.len() / 2])?;
        self.step()?;
        super::super::prune::Really.free(path, ranges, temporary)?;
        // The copy of a file system without holes is left behind.
        fs::write(temporary, b"half a pack").unwrap();
        self.step()
    }
}

#[test]
fn a_pruning_that_is_killed_anywhere_leaves_whole_checkpoints_and_the_next_one_completes_it() {
    let complete = {
        let (_directory, store) = new_store();
        chain(&store, "shop", 4);
        store.prune(None, keep(2), false).unwrap();
        sizes(&store)
    };
    for steps in 0.. {
        let (_directory, store) = new_store();
        let all = chain(&store, "shop", 4);
        let result = store.prune_with(None, keep(2), &mut Dies(steps));
        assert_whole(&store, &all[2..]);
        let died = result.is_err();
        // The next dump is an increment like any other, whatever is half gone.
        let memory = all[3].1.clone();
        let next = increment(&store, "shop", all.last(), &memory);
        store.prune(None, keep(3), false).unwrap();
        assert_whole(&store, &[&all[2..], &[(next, memory)]].concat());
        assert_eq!(files_in(&store, "tmp"), 0);
        fs::remove_file(store.root().join("jobs/shop/5.json")).unwrap();
        store.prune(None, keep(2), false).unwrap();
        assert_whole(&store, &all[2..]);
        assert_eq!(sizes(&store), complete, "{steps} steps");
        if !died {
            assert!(steps > 8);
            return;
        }
    }
}

/// As on a file system that has no `fallocate`.
struct Copies;

impl Disk for Copies {
    fn remove(&mut self, path: &Path) -> Result<()> {
        super::super::prune::Really.remove(path)
    }

    fn sync(&mut self, directory: &Path) -> Result<()> {
        super::super::prune::Really.sync(directory)
    }

    fn free(&mut self, path: &Path, ranges: &[Range<u64>], temporary: &Path) -> Result<()> {
        super::super::holes::rewrite(path, ranges, temporary)
    }
}

#[test]
fn packs_are_copied_where_holes_cannot_be_made() {
    let (_directory, store) = new_store();
    let all = chain(&store, "shop", 4);
    let before = usage(&store);
    let report = store.prune_with(None, keep(1), &mut Copies).unwrap();
    assert!(report.repacked > 0);
    assert_whole(&store, &all[3..]);
    let after = usage(&store);
    assert!(before.iter().any(|(name, bytes)| after.get(name).is_some_and(|after| after < bytes)));
    // Holes stay holes when the file is copied once more.
    let next = increment(&store, "shop", all.last(), &all[0].1);
    store.prune_with(None, keep(1), &mut Copies).unwrap();
    assert_whole(&store, &[(next, all[0].1.clone())]);
    assert_eq!(store.prune(None, keep(1), false).unwrap().bytes, 0);
}

#[test]
fn nothing_is_removed_while_a_checkpoint_that_stays_cannot_be_read() {
    for damage in ["manifest", "part"] {
        let (_directory, store) = new_store();
        let all = chain(&store, "shop", 3);
        let part = store.part_path(all[2].0.manifest.nodes[0].part.id);
        let path = if damage == "part" { part } else { store.root().join("jobs/shop/3.json") };
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..good.len() / 2]).unwrap();
        let before = usage(&store);
        let error = store.prune(None, keep(2), false).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert_eq!(usage(&store), before);
        // An old one may be as damaged as it likes.
        let memory = all[1].1.clone();
        let next = commit(&store, "shop", &memory);
        assert_eq!(store.prune(None, keep(1), false).unwrap().removed, ["shop@1", "shop@2", "shop@3"]);
        assert_whole(&store, &[(next, memory)]);
    }
}

#[test]
fn a_dump_that_lives_keeps_everything_and_a_dead_one_nothing() {
    let (_directory, store) = new_store();
    let all = chain(&store, "shop", 2);
    let dump = store.begin_dump(&job("other")).unwrap();
    let options = PartOptions { dump: Some(dump.id().clone()), ..Default::default() };
    let part = write(&store, options.clone(), &all[0].1);
    assert!(matches!(store.prune(None, keep(1), false), Err(StoreError::Locked { .. })));
    assert!(matches!(store.prune(None, keep(1), true), Err(StoreError::Locked { .. })));
    let other = dump.commit(manifest(part)).unwrap();
    let killed = store.begin_dump(&job("third")).unwrap();
    let options = PartOptions { dump: Some(killed.id().clone()), ..Default::default() };
    let lost = write(&store, options, &all[0].1);
    killed.kill();
    let report = store.prune(None, keep(1), false).unwrap();
    assert_eq!((report.removed, report.parts), (vec!["shop@1".to_owned()], 2));
    assert!(matches!(store.open_part(&lost), Err(StoreError::Missing { .. })));
    assert_whole(&store, &[all[1].clone(), (other, all[0].1.clone())]);
    assert_eq!(files_in(&store, "tmp"), 0);
}

/// A base that was opened before it was pruned: its packs may still be there, its chunks are not.
#[test]
fn a_base_that_was_pruned_is_not_pointed_into() {
    let (_directory, store) = new_store();
    let all = chain(&store, "shop", 3);
    let base = store.open_part(&all[1].0.manifest.nodes[0].part).unwrap();
    let runs = base.page_map(MemoryId(0)).unwrap();
    store.prune(None, keep(1), false).unwrap();
    let mut part = store.part_writer(PartOptions::default()).unwrap();
    part.memory(MemoryId(0)).unwrap();
    assert!(matches!(part.inherit(MemoryId(0), &base, runs), Err(StoreError::Missing { .. })));
    let memory = &all[1].1;
    let part = write(&store, PartOptions { base: Some(base.clone()), ..Default::default() }, memory);
    assert_eq!(part.inherited_pages, 0);
    assert!(read(&store, &part).unwrap() == *memory);
}

/// Increments for ever: the packs stay few, and each increment small.
#[test]
fn almost_empty_packs_are_left_behind() {
    for with_base in [false, true] {
        let (_directory, store) = new_store();
        let mut memory = Memory::from([(0, (0..320).map(|n| (n, page(2, n))).collect())]);
        let mut last = (commit(&store, "shop", &memory), memory.clone());
        for round in 0..40_u64 {
            // Always other pages, so that every pack stays in use for long: a whole chunk, and one page.
            let window = 16 * (round % 20);
            for n in (window..window + 16).chain([(round * 7) % 320]) {
                memory.get_mut(&0).unwrap().insert(n, page(2, 1000 * round + n));
            }
            let base = store.open_part(&last.0.manifest.nodes[0].part).unwrap();
            let dump = store.begin_dump(&job("shop")).unwrap();
            let options = PartOptions {
                dump: Some(dump.id().clone()),
                base: with_base.then(|| base.clone()),
                most_packs: Some(6),
                ..Default::default()
            };
            let mut part = store.part_writer(options).unwrap();
            part.memory(MemoryId(0)).unwrap();
            for (&number, content) in &memory[&0] {
                if last.1[&0].get(&number) == Some(content) {
                    let map = base.page_map(MemoryId(0)).unwrap();
                    let runs: Vec<_> = pages::slice(map, number, number + 1).collect();
                    part.inherit(MemoryId(0), &base, &runs).unwrap();
                } else {
                    part.pages(MemoryId(0), number, content).unwrap();
                    // What is taken over gives way to what is said, as all that is inherited does.
                    let map = base.page_map(MemoryId(0)).unwrap();
                    let runs: Vec<_> = pages::slice(map, number, number + 1).collect();
                    part.inherit(MemoryId(0), &base, &runs).unwrap();
                }
            }
            let part = part.finish().unwrap();
            assert!(store.open_part(&part).unwrap().packs().len() <= 7, "round {round}");
            assert!(part.inherited_pages > 200, "round {round}: {}", part.inherited_pages);
            last = (dump.commit(manifest(part)).unwrap(), memory.clone());
            store.prune(None, keep(1), false).unwrap();
        }
        assert_whole(&store, &[last]);
        assert!(files_in(&store, "packs") <= 7);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Checkpoints that take pages from older ones, with prunings in between.
    #[test]
    fn what_stays_is_whole(
        rounds in proptest::collection::vec(
            (proptest::collection::vec((0u64..200, any::<u8>(), 0u64..40), 0..60), proptest::option::of(1usize..4)),
            1..8),
    ) {
        let (_directory, store) = new_store();
        let (mut memory, mut all) = (Memory::from([(0, BTreeMap::new())]), Vec::new());
        for (changes, prune) in rounds {
            for (number, kind, seed) in changes {
                memory.get_mut(&0).unwrap().insert(number, page(kind, seed));
            }
            all.push((increment(&store, "shop", all.last(), &memory), memory.clone()));
            if let Some(kept) = prune {
                store.prune(None, keep(kept), false).unwrap();
                all.drain(..all.len().saturating_sub(kept));
            }
            for (checkpoint, memory) in &all {
                prop_assert_eq!(store.verify(checkpoint, 100).problems, []);
                prop_assert!(read(&store, &checkpoint.manifest.nodes[0].part).unwrap() == *memory);
            }
        }
    }
}
