//! Copy-on-write sharing: what a stub that was cloned from another has to change to become another process.
//!
//! Forked processes share the pages that neither has written since. In the image such pages have the same source; at
//! restore they are shared again if the child's stub is cloned when its parent's memory is there. This is the comparison
//! of the two, as a plan; nothing here touches a process.

use ckpt_common::image::PAGE_SIZE;
use ckpt_common::image::file::FileId;
use ckpt_common::image::pages::{PageRun, Source};
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};

/// What an address space has, or shall have: mappings, and the private pages in them.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    /// Mappings in address order.
    pub(super) space: &'a AddressSpace,
    /// The executable; the same number for the same file.
    pub(super) exe: FileId,
    /// Page map.
    pub(super) pages: &'a [PageRun],
}

/// A range of addresses.
pub(super) type Range = std::ops::Range<u64>;

/// What to do, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// What has to go.
    pub(super) unmap: Vec<Range>,
    /// Protections that differ.
    pub(super) protect: Vec<(Range, i32)>,
    /// Mappings that reach farther: from where they are now to this end.
    pub(super) grow: Vec<(Range, u64)>,
    /// Indices of mappings to be made.
    pub(super) map: Vec<usize>,
    /// Advice to be given to mappings that were there.
    pub(super) advise: Vec<(Range, i32)>,
    /// Pages that have to go while their mapping stays.
    pub(super) discard: Vec<Range>,
    /// Pages to be written.
    pub(super) write: Vec<PageRun>,
    /// Number of pages that stay shared.
    pub(super) shared: u64,
}

/// A part of a mapping that stays.
struct Kept {
    range: Range,
    anonymous: bool,
    private: bool,
    /// The clone has the mapping without its pages.
    wiped: bool,
}

/// What turns a clone of `from` into `to`; `None` where they are of different programs.
pub(super) fn plan(from: View<'_>, to: View<'_>) -> Option<Plan> {
    if from.exe != to.exe || from.space.vdso != to.space.vdso || !kernel(from.space).eq(kernel(to.space)) {
        return None;
    }
    let mut plan = Plan::default();
    let mut kept: Vec<Kept> = Vec::new();
    for (index, wanted) in to.space.mappings.iter().enumerate() {
        if matches!(wanted.backing, Backing::Kernel { .. }) || wanted.start >= wanted.end {
            continue;
        }
        let at = from.space.mappings.partition_point(|m| m.end <= wanted.start);
        let have = from.space.mappings.get(at).filter(|have| continues(have, wanted));
        let Some(have) = have else {
            plan.map.push(index);
            write_all(to.pages, &(wanted.start..wanted.end), &mut plan);
            continue;
        };
        let range = wanted.start..wanted.end.min(have.end);
        if have.prot != wanted.prot {
            plan.protect.push((range.clone(), wanted.prot));
        }
        if wanted.end > range.end {
            plan.grow.push((range.clone(), wanted.end));
            write_all(to.pages, &(range.end..wanted.end), &mut plan);
        }
        let new = wanted.advice.iter().filter(|advice| !have.advice.contains(advice));
        plan.advise.extend(new.map(|advice| (wanted.start..wanted.end, *advice)));
        kept.push(Kept {
            range,
            anonymous: wanted.backing == Backing::Anonymous,
            private: !matches!(wanted.backing, Backing::SharedFile { .. }),
            wiped: have.advice.contains(&libc::MADV_WIPEONFORK),
        });
    }
    for have in from.space.mappings.iter().filter(|m| inherited(m)) {
        let mut at = have.start;
        let first = kept.partition_point(|kept| kept.range.end <= have.start);
        for kept in kept[first..].iter().take_while(|kept| kept.range.start < have.end) {
            if at < kept.range.start {
                plan.unmap.push(at..kept.range.start);
            }
            at = kept.range.end;
        }
        if at < have.end {
            plan.unmap.push(at..have.end);
        }
    }
    for kept in kept.iter().filter(|kept| kept.private) {
        compare(if kept.wiped { &[] } else { from.pages }, to.pages, kept, &mut plan);
    }
    // What fills memory reads the runs as a page map.
    plan.write.sort_unstable_by_key(|run| run.page.get());
    Some(plan)
}

/// What turns pages `from` into pages `to` within the same private mappings of an address space.
pub(super) fn rewrite(space: &AddressSpace, from: &[PageRun], to: &[PageRun]) -> Plan {
    let mut plan = Plan::default();
    for mapping in space.mappings.iter().filter(|m| is_private(m)) {
        let (range, anonymous) = (mapping.start..mapping.end, mapping.backing == Backing::Anonymous);
        compare(from, to, &Kept { range, anonymous, private: true, wiped: false }, &mut plan);
    }
    plan
}

/// The pages with which a parent is best cloned: of each private page the content that most of the parent and the
/// `children` have. What the parent has written since it forked would otherwise be in none of them.
pub(super) fn common(space: &AddressSpace, own: &[PageRun], children: &[&[PageRun]]) -> Vec<PageRun> {
    let mut common = Vec::new();
    for mapping in space.mappings.iter().filter(|m| is_private(m)) {
        let range = mapping.start..mapping.end;
        let mut walks: Vec<Walk<'_>> =
            [&own].into_iter().chain(children).map(|pages| Walk::new(pages, &range)).collect();
        let (mut page, end) = (range.start / PAGE_SIZE as u64, range.end / PAGE_SIZE as u64);
        // Few of them differ: a list is the fastest way to count.
        let mut counts: Vec<(Option<Source>, usize)> = Vec::new();
        while page < end {
            let mut until = end;
            counts.clear();
            for walk in &mut walks {
                walk.page = page;
                let (source, change) = walk.here();
                until = until.min(change);
                match counts.iter_mut().find(|(known, _)| *known == source) {
                    Some((_, count)) => *count += 1,
                    None => counts.push((source, 1)),
                }
            }
            // The first of those with the highest count: the parent's own, where it is among them.
            let most = counts.iter().map(|(_, count)| *count).max();
            if let Some((Some(source), _)) = counts.iter().find(|(_, count)| Some(*count) == most) {
                push(&mut common, page, until, *source);
            }
            page = until;
        }
    }
    common
}

/// May the mapping have pages of its own?
fn is_private(mapping: &Mapping) -> bool {
    matches!(mapping.backing, Backing::Anonymous | Backing::PrivateFile { .. })
}

fn kernel(space: &AddressSpace) -> impl Iterator<Item = &Mapping> {
    space.mappings.iter().filter(|m| matches!(m.backing, Backing::Kernel { .. }))
}

/// Does a clone have the mapping?
fn inherited(mapping: &Mapping) -> bool {
    !matches!(mapping.backing, Backing::Kernel { .. })
        && !mapping.advice.contains(&libc::MADV_DONTFORK)
        && mapping.start < mapping.end
}

/// Can `wanted` be made from the part of `have` that lies where it begins?
fn continues(have: &Mapping, wanted: &Mapping) -> bool {
    let same_place = |offset: &u64, of: &Mapping| offset.wrapping_sub(of.start);
    let same = match (&have.backing, &wanted.backing) {
        (Backing::Anonymous, Backing::Anonymous) => true,
        (Backing::PrivateFile { file: a, offset: x }, Backing::PrivateFile { file: b, offset: y })
        | (Backing::SharedFile { file: a, offset: x }, Backing::SharedFile { file: b, offset: y }) => {
            a == b && same_place(x, have) == same_place(y, wanted)
        }
        _ => false,
    };
    // Advice cannot be taken back.
    same && inherited(have)
        && have.start <= wanted.start
        && have.flags == wanted.flags
        && have.advice.iter().all(|advice| wanted.advice.contains(advice))
}

/// Pages of a new mapping, or of a new part of one.
fn write_all(pages: &[PageRun], range: &Range, plan: &mut Plan) {
    let (mut walk, end) = (Walk::new(pages, range), range.end / PAGE_SIZE as u64);
    while walk.page < end {
        let (source, until) = walk.here();
        let until = until.min(end);
        if let Some(source) = source {
            push(&mut plan.write, walk.page, until, source);
        }
        walk.page = until;
    }
}

fn compare(from: &[PageRun], to: &[PageRun], kept: &Kept, plan: &mut Plan) {
    let (mut have, mut want) = (Walk::new(from, &kept.range), Walk::new(to, &kept.range));
    let end = kept.range.end / PAGE_SIZE as u64;
    while have.page < end {
        let ((old, a), (new, b)) = (have.here(), want.here());
        let (page, until) = (have.page, a.min(b).min(end));
        // In anonymous memory a page of zeros is the same as none.
        let plain = |source: Option<Source>| source.filter(|s| !(kept.anonymous && *s == Source::Zero));
        match (plain(old), plain(new)) {
            (old, new) if old == new => plan.shared += old.map_or(0, |_| until - page),
            (_, Some(new)) => push(&mut plan.write, page, until, new),
            (_, None) => {
                let bytes = page * PAGE_SIZE as u64..until * PAGE_SIZE as u64;
                match plan.discard.last_mut().filter(|last| last.end == bytes.start) {
                    Some(last) => last.end = bytes.end,
                    None => plan.discard.push(bytes),
                }
            }
        }
        (have.page, want.page) = (until, until);
    }
}

/// Appends pages; a run counts its pages in 32 bits.
fn push(runs: &mut Vec<PageRun>, page: u64, until: u64, source: Source) {
    let mut at = page;
    while at < until {
        let count = (until - at).min(u32::MAX.into()) as u32;
        runs.push(PageRun::new(at, count, source));
        at += u64::from(count);
    }
}

/// A walk along a page map.
struct Walk<'a> {
    runs: &'a [PageRun],
    /// Where it is. May only grow.
    page: u64,
}

impl<'a> Walk<'a> {
    fn new(runs: &'a [PageRun], range: &Range) -> Self {
        let page = range.start / PAGE_SIZE as u64;
        let skip = runs.partition_point(|run| run.end() <= page);
        Self { runs: &runs[skip..], page }
    }

    /// The source of the page here (`None`: not present), and the first page behind those that continue it.
    fn here(&mut self) -> (Option<Source>, u64) {
        while let Some((first, rest)) = self.runs.split_first() {
            let start = first.page.get();
            if first.end() <= self.page {
                self.runs = rest;
                continue;
            }
            if start > self.page {
                return (None, start);
            }
            let source = match first.source() {
                Source::Zero => Source::Zero,
                Source::Chunk { pack, chunk, page } => {
                    // Inside a chunk, which has few pages.
                    Source::Chunk { pack, chunk, page: page + (self.page - start) as u16 }
                }
            };
            return (Some(source), first.end());
        }
        (None, u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::MemoryId;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const PAGE: u64 = PAGE_SIZE as u64;
    /// First address of the model's address spaces, and their size in pages.
    const BASE: u64 = 0x10_0000;
    const PAGES: u64 = 64;

    fn space(mappings: Vec<Mapping>) -> AddressSpace {
        AddressSpace {
            memory: MemoryId(1),
            fields: [0; 11],
            auxv: Vec::new(),
            exe: FileId(0),
            mappings,
            vdso: Vec::new(),
        }
    }

    fn mapping(start: u64, end: u64) -> Mapping {
        Mapping {
            start,
            end,
            prot: 3,
            backing: Backing::Anonymous,
            flags: 0,
            advice: Vec::new(),
            locked: 0,
            huge: false,
        }
    }

    fn chunk(chunk: u32, page: u16) -> Source {
        Source::Chunk { pack: 0, chunk, page }
    }

    #[test]
    fn a_child_that_changed_one_page_gets_one_page() {
        let heap = space(vec![mapping(BASE, BASE + 16 * PAGE)]);
        let first = BASE / PAGE;
        let parent = [PageRun::new(first, 16, chunk(1, 0))];
        let child = [
            PageRun::new(first, 3, chunk(1, 0)),
            PageRun::new(first + 3, 1, chunk(2, 0)),
            PageRun::new(first + 4, 10, chunk(1, 4)),
            PageRun::new(first + 14, 1, Source::Zero),
        ];
        let plan = plan(
            View { space: &heap, exe: FileId(0), pages: &parent },
            View { space: &heap, exe: FileId(0), pages: &child },
        )
        .unwrap();
        assert_eq!(plan.write, [child[1]]);
        assert_eq!(plan.discard, std::slice::from_ref(&(BASE + 14 * PAGE..BASE + 16 * PAGE)));
        assert_eq!(plan.shared, 13);
        assert_eq!((plan.unmap.len(), plan.map.len(), plan.grow.len()), (0, 0, 0));
    }

    #[test]
    fn a_heap_that_grew_is_kept_and_another_program_is_not() {
        let (short, long) =
            (space(vec![mapping(BASE, BASE + PAGE)]), space(vec![mapping(BASE, BASE + 4 * PAGE)]));
        let pages = [PageRun::new(BASE / PAGE, 1, chunk(1, 0))];
        let (from, to) = (
            View { space: &short, exe: FileId(0), pages: &pages },
            View { space: &long, exe: FileId(0), pages: &pages },
        );
        let grown = plan(from, to).unwrap();
        assert_eq!(grown.grow, [(BASE..BASE + PAGE, BASE + 4 * PAGE)]);
        assert_eq!((grown.shared, grown.write.len(), grown.map.len()), (1, 0, 0));
        let shrunk = plan(to, from).unwrap();
        assert_eq!(shrunk.unmap, std::slice::from_ref(&(BASE + PAGE..BASE + 4 * PAGE)));
        assert_eq!(plan(from, View { exe: FileId(9), ..to }), None);
    }

    #[test]
    fn what_the_parent_wrote_after_its_forks_is_not_inherited() {
        let heap = space(vec![mapping(BASE, BASE + 16 * PAGE)]);
        let first = BASE / PAGE;
        let child = [PageRun::new(first, 16, chunk(1, 0))];
        let parent = [
            PageRun::new(first, 4, chunk(1, 0)),
            PageRun::new(first + 4, 2, chunk(7, 0)),
            PageRun::new(first + 6, 8, chunk(1, 6)),
        ];
        let base = common(&heap, &parent, &[&child, &child]);
        let view = |pages| View { space: &heap, exe: FileId(0), pages };
        let clone = plan(view(&base), view(&child)).unwrap();
        assert_eq!((clone.shared, clone.write.len(), clone.discard.len()), (16, 0, 0));
        let own = rewrite(&heap, &base, &parent);
        assert_eq!(own.write, [parent[1]]);
        assert_eq!(own.discard, std::slice::from_ref(&(BASE + 14 * PAGE..BASE + 16 * PAGE)));
        // With one child there is nothing to win.
        assert_eq!(
            rewrite(&heap, &common(&heap, &parent, &[&child]), &parent),
            Plan { shared: 14, ..Plan::default() }
        );
    }

    /// What is mapped at one page, and what is in it: in private memory its source, if it has one of its own.
    #[derive(Clone, Debug, PartialEq)]
    struct Page {
        prot: i32,
        backing: Backing,
        flags: i32,
        advice: std::collections::BTreeSet<i32>,
        source: Option<Source>,
    }

    type Model = BTreeMap<u64, Page>;

    fn at(runs: &[PageRun], page: u64) -> Option<Source> {
        Walk::new(runs, &(page * PAGE..(page + 1) * PAGE)).here().0
    }

    fn put(model: &mut Model, mapping: &Mapping, range: &Range, pages: &[PageRun]) {
        for page in range.start / PAGE..range.end / PAGE {
            let move_to = |offset: u64| offset.wrapping_sub(mapping.start).wrapping_add(page * PAGE);
            let backing = match mapping.backing.clone() {
                Backing::PrivateFile { file, offset } => {
                    Backing::PrivateFile { file, offset: move_to(offset) }
                }
                Backing::SharedFile { file, offset } => Backing::SharedFile { file, offset: move_to(offset) },
                other => other,
            };
            let own = at(pages, page).filter(|_| is_private(mapping));
            let source = own.filter(|s| !(backing == Backing::Anonymous && *s == Source::Zero));
            let advice = mapping.advice.iter().copied().collect();
            let new = Page { prot: mapping.prot, backing, flags: mapping.flags, advice, source };
            assert!(model.insert(page, new).is_none(), "page {page:#x} was mapped already");
        }
    }

    fn model(view: View<'_>) -> Model {
        let mut model = Model::new();
        view.space.mappings.iter().for_each(|m| put(&mut model, m, &(m.start..m.end), view.pages));
        model
    }

    /// What the kernel does at fork(2), and then with the plan.
    fn performed(from: View<'_>, to: View<'_>, plan: &Plan) -> Model {
        let mut model = model(from);
        model.retain(|_, page| !page.advice.contains(&libc::MADV_DONTFORK));
        for page in model.values_mut().filter(|page| page.advice.contains(&libc::MADV_WIPEONFORK)) {
            page.source = None;
        }
        changed(model, to, plan)
    }

    fn changed(mut model: Model, to: View<'_>, plan: &Plan) -> Model {
        for range in &plan.unmap {
            (range.start / PAGE..range.end / PAGE).for_each(|page| drop(model.remove(&page)));
        }
        for (range, prot) in &plan.protect {
            (range.start / PAGE..range.end / PAGE)
                .for_each(|page| model.get_mut(&page).unwrap().prot = *prot);
        }
        for (range, end) in &plan.grow {
            let last = model[&(range.end / PAGE - 1)].clone();
            for page in range.end / PAGE..end / PAGE {
                let by = page * PAGE - (range.end - PAGE);
                let backing = match last.backing.clone() {
                    Backing::PrivateFile { file, offset } => {
                        Backing::PrivateFile { file, offset: offset + by }
                    }
                    Backing::SharedFile { file, offset } => Backing::SharedFile { file, offset: offset + by },
                    other => other,
                };
                let new = Page { source: None, backing, ..last.clone() };
                assert!(model.insert(page, new).is_none(), "no room to grow at {page:#x}");
            }
        }
        for index in &plan.map {
            let mapping = &to.space.mappings[*index];
            put(&mut model, mapping, &(mapping.start..mapping.end), &[]);
        }
        for (range, advice) in &plan.advise {
            for page in range.start / PAGE..range.end / PAGE {
                model.get_mut(&page).unwrap().advice.insert(*advice);
            }
        }
        for range in &plan.discard {
            (range.start / PAGE..range.end / PAGE)
                .for_each(|page| model.get_mut(&page).unwrap().source = None);
        }
        for run in &plan.write {
            for page in run.page.get()..run.end() {
                let here = model.get_mut(&page).unwrap();
                let source = at(&[*run], page);
                here.source = source.filter(|s| !(here.backing == Backing::Anonymous && *s == Source::Zero));
            }
        }
        model
    }

    /// Neighbouring pages with these attributes are one mapping.
    type Kind = (u8, i32, u8, bool);

    fn kind() -> impl Strategy<Value = Option<Kind>> {
        // Mostly what can be shared, so that there is something to compare.
        prop_oneof![
            6 => Just(Some((0, 3, 0, false))),
            2 => (0u8..4, prop_oneof![Just(1), Just(3)], 0u8..6, any::<bool>()).prop_map(Some),
            2 => Just(None),
        ]
    }

    fn mappings(kinds: &[Option<Kind>]) -> Vec<Mapping> {
        let mut all: Vec<(Mapping, Kind)> = Vec::new();
        for (page, kind) in (0..).zip(kinds) {
            let (start, Some(kind)) = (BASE + page * PAGE, *kind) else { continue };
            match all.last_mut().filter(|(last, same)| last.end == start && *same == kind) {
                Some((last, _)) => last.end += PAGE,
                None => {
                    let (backing, prot, advice, down) = kind;
                    let offset = start;
                    let backing = match backing {
                        0 => Backing::Anonymous,
                        1 => Backing::PrivateFile { file: FileId(1), offset },
                        2 => Backing::SharedFile { file: FileId(2), offset },
                        _ => Backing::PrivateFile { file: FileId(1), offset: offset + 8 * PAGE },
                    };
                    let advice = match advice {
                        1 => vec![libc::MADV_DONTFORK],
                        2 => vec![libc::MADV_WIPEONFORK],
                        3 => vec![libc::MADV_DONTDUMP],
                        4 => vec![libc::MADV_DONTDUMP, libc::MADV_MERGEABLE],
                        _ => Vec::new(),
                    };
                    let flags = if down { libc::MAP_NORESERVE } else { 0 };
                    let new = Mapping {
                        start,
                        end: start + PAGE,
                        prot,
                        backing,
                        flags,
                        advice,
                        locked: 0,
                        huge: false,
                    };
                    all.push((new, kind));
                }
            }
        }
        all.into_iter().map(|(mapping, _)| mapping).collect()
    }

    /// Of each page nothing, zeros, or one of two contents.
    fn runs(sources: &[u8], mappings: &[Mapping]) -> Vec<PageRun> {
        let mut runs = Vec::new();
        for (page, source) in (BASE / PAGE..).zip(sources) {
            let mapped = mappings.iter().any(|m| (m.start..m.end).contains(&(page * PAGE)) && is_private(m));
            let source = match source {
                0 => Source::Zero,
                1..5 => chunk(page as u32 / 8, page as u16 % 8),
                5 => chunk(1000 + page as u32, 3),
                _ => continue,
            };
            if mapped {
                push(&mut runs, page, page + 1, source);
            }
        }
        runs
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn the_plan_makes_the_child(
            kinds in proptest::collection::vec((1usize..12, kind()), 12),
            edits in proptest::collection::vec((0usize..PAGES as usize, 1usize..12, kind()), 0..6),
            sources in proptest::collection::vec(0u8..8, PAGES as usize),
            changes in proptest::collection::vec((0usize..PAGES as usize, 0u8..8), 0..12),
        ) {
            let mut pages: Vec<Option<Kind>> =
                kinds.iter().flat_map(|(count, kind)| std::iter::repeat_n(*kind, *count)).collect();
            pages.resize(PAGES as usize, None);
            let parent = space(mappings(&pages));
            let parent_pages = runs(&sources, &parent.mappings);
            for (at, count, kind) in edits {
                pages.iter_mut().skip(at).take(count).for_each(|page| *page = kind);
            }
            let child = space(mappings(&pages));
            let mut sources = sources;
            changes.iter().for_each(|(at, source)| sources[*at] = *source);
            let child_pages = runs(&sources, &child.mappings);
            let from = View { space: &parent, exe: FileId(0), pages: &parent_pages };
            let to = View { space: &child, exe: FileId(0), pages: &child_pages };
            let plan = plan(from, to).unwrap();
            let (got, wanted) = (performed(from, to, &plan), model(to));
            prop_assert_eq!(&got, &wanted, "{:?}", plan);
            // The parent's own pages come back from whatever its children made of them.
            let base = common(&parent, &parent_pages, &[&child_pages, &child_pages]);
            let (from, to) = (View { space: &parent, exe: FileId(0), pages: &base }, View { space: &parent, exe: FileId(0), pages: &parent_pages });
            let back = rewrite(&parent, &base, &parent_pages);
            prop_assert_eq!(changed(model(from), to, &back), model(to));
            // Nothing is written that was there.
            let mut clone = model(View { space: &parent, exe: FileId(0), pages: &parent_pages });
            clone.retain(|_, page| !page.advice.contains(&libc::MADV_DONTFORK));
            for run in &plan.write {
                for page in run.page.get()..run.end() {
                    let there = clone.get(&page).filter(|_| parent.mappings == child.mappings);
                    let there = there.filter(|there| !there.advice.contains(&libc::MADV_WIPEONFORK));
                    prop_assert!(there.is_none_or(|there| there.source.is_none() || there.source != wanted[&page].source));
                }
            }
        }
    }
}
