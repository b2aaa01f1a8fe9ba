//! The commit lists of an address space.
//!
//! What was written since the last look is remembered by the kernel, page by page. Here is what it has told us and
//! has forgotten since, because the pages were protected again. A modified page is on exactly one list, until a
//! committed checkpoint holds it.

use super::page_set::PageSet;

/// Modified pages, by what is still to be done with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitLists {
    /// Modified in this checkpoint interval.
    current: PageSet,
    /// Modified before the cut, to be saved for the checkpoint under way.
    previous: PageSet,
    /// Saved for the checkpoint under way, and not modified between that and the cut.
    saved: PageSet,
}

impl CommitLists {
    /// Lists that begin with what an earlier dump, which was not committed, has left.
    pub fn with(current: PageSet) -> Self {
        Self { current, ..Self::default() }
    }

    /// Pages to be saved before the cut, as far as it goes.
    pub fn current(&self) -> &PageSet {
        &self.current
    }

    /// Pages to be saved after the cut.
    pub fn previous(&self) -> &PageSet {
        &self.previous
    }

    /// Pages that the last committed checkpoint does not hold as they are.
    pub fn modified(&self) -> PageSet {
        self.current.union(&self.previous).union(&self.saved)
    }

    /// The kernel says that these were written, and has protected them again.
    pub fn written(&mut self, pages: &PageSet) {
        self.current = self.current.union(pages);
        self.saved = self.saved.difference(pages);
    }

    /// Pages of the current list were saved before the cut.
    pub fn save_early(&mut self, pages: &PageSet) {
        let pages = self.current.intersection(pages);
        self.current = self.current.difference(&pages);
        self.saved = self.saved.union(&pages);
    }

    /// The cut: the current list becomes the previous one.
    pub fn swap(&mut self) {
        self.previous = std::mem::take(&mut self.current).union(&self.previous);
    }

    /// The cut did not come about.
    pub fn swap_back(&mut self) {
        self.current = std::mem::take(&mut self.previous).union(&self.current);
    }

    /// Pages of the previous list are saved, or exist no more.
    pub fn save(&mut self, pages: &PageSet) {
        let pages = self.previous.intersection(pages);
        self.previous = self.previous.difference(&pages);
        self.saved = self.saved.union(&pages);
    }

    /// The checkpoint is committed and holds what was saved.
    pub fn commit(&mut self) {
        self.saved = PageSet::default();
    }

    /// There will be no checkpoint: everything is to be saved again.
    pub fn abort(&mut self) {
        self.current = self.modified();
        self.previous = PageSet::default();
        self.saved = PageSet::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// What can happen to a page, with what the world looks like.
    #[derive(Clone, Debug)]
    enum Event {
        Write(u64),
        Scan,
        SaveEarly(u64, u64),
        Cut,
        CutFails,
        Save(u64, u64),
        End(bool),
    }

    fn event() -> impl Strategy<Value = Event> {
        let range = (0_u64..40, 0_u64..20);
        prop_oneof![
            6 => (0_u64..40).prop_map(Event::Write),
            2 => Just(Event::Scan),
            2 => range.clone().prop_map(|(a, n)| Event::SaveEarly(a, n)),
            2 => Just(Event::Cut),
            1 => Just(Event::CutFails),
            3 => range.prop_map(|(a, n)| Event::Save(a, n)),
            2 => any::<bool>().prop_map(Event::End),
        ]
    }

    /// A memory of versions, a kernel that remembers writes, and the lists between them.
    #[derive(Default)]
    struct World {
        memory: BTreeMap<u64, u32>,
        kernel: BTreeSet<u64>,
        lists: CommitLists,
        /// Versions in the checkpoint under way, in the committed one, and at the cut.
        saving: BTreeMap<u64, u32>,
        committed: BTreeMap<u64, u32>,
        cut: Option<BTreeMap<u64, u32>>,
    }

    impl World {
        fn scan(&mut self) {
            let written: PageSet = std::mem::take(&mut self.kernel).into_iter().map(|p| p..p + 1).collect();
            self.lists.written(&written);
        }

        fn page(&self, page: u64) -> u32 {
            let now = self.cut.as_ref().unwrap_or(&self.memory);
            now.get(&page).copied().unwrap_or(0)
        }

        fn take(&mut self, pages: &PageSet) {
            for page in pages.ranges().iter().cloned().flatten() {
                let version = self.page(page);
                self.saving.insert(page, version);
            }
        }

        fn happens(&mut self, event: &Event) {
            let in_cut = self.cut.is_some();
            match *event {
                Event::Write(page) => {
                    *self.memory.entry(page).or_default() += 1;
                    self.kernel.insert(page);
                }
                Event::Scan if !in_cut => self.scan(),
                Event::SaveEarly(start, n) if !in_cut => {
                    let pages = self.lists.current().within(start..start + n);
                    self.take(&pages);
                    self.lists.save_early(&pages);
                }
                Event::Cut if !in_cut => {
                    self.scan();
                    self.lists.swap();
                    self.cut = Some(self.memory.clone());
                }
                Event::CutFails if in_cut => {
                    self.lists.swap_back();
                    self.cut = None;
                }
                Event::Save(start, n) if in_cut => {
                    let pages = self.lists.previous().within(start..start + n);
                    self.take(&pages);
                    self.lists.save(&pages);
                }
                Event::End(true) if in_cut => {
                    let rest = self.lists.previous().clone();
                    self.take(&rest);
                    self.lists.save(&rest);
                    let saved: PageSet = self.lists.modified();
                    for page in saved.ranges().iter().cloned().flatten() {
                        self.committed.insert(page, self.saving[&page]);
                    }
                    self.lists.commit();
                    let cut = self.cut.take().unwrap_or_default();
                    // The proof: the committed checkpoint is the memory at the cut.
                    for page in 0..60 {
                        assert_eq!(self.committed.get(&page).unwrap_or(&0), cut.get(&page).unwrap_or(&0));
                    }
                    self.saving.clear();
                }
                Event::End(false) => {
                    self.lists.abort();
                    self.saving.clear();
                    self.cut = None;
                }
                _ => {}
            }
            let CommitLists { current, previous, saved } = &self.lists;
            assert!(current.intersection(saved).is_empty() && previous.intersection(saved).is_empty());
            assert!(current.intersection(previous).is_empty());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn no_modified_page_is_ever_lost(events in proptest::collection::vec(event(), 0..120)) {
            let mut world = World::default();
            events.iter().for_each(|event| world.happens(event));
            // Whatever happened, a dump now is right.
            if world.cut.is_some() {
                world.happens(&Event::End(false));
            }
            world.happens(&Event::Cut);
            world.happens(&Event::End(true));
        }
    }
}
