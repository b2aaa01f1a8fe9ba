//! Which page of which object comes from where: noted in any order, put in order at the end.

use ckpt_common::image::{
    Digest, FormatError, MemoryId,
    pages::{PAGE_LIMIT, PageMapBuilder, PageRun, Source},
};
use std::collections::{BTreeMap, BinaryHeap, HashMap};

/// Each pass halves every chain of shared pages, so this many resolve any chain there can be.
const PASSES: usize = 64;

/// Where the content of pages is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is no such page: what was said of it before does not count.
    Absent,
    /// Nowhere: zeros.
    Zero,
    /// In a chunk that this writer has handed over; where that is, is known at the end.
    Ticket { ticket: u64, page: u16 },
    /// In a pack of an older part; `pack` is an index into [`PageTable::older`].
    Older { pack: u32, chunk: u32, page: u16 },
    /// Where those pages of another object are.
    Same { of: MemoryId, page: u64 },
}

impl Place {
    /// The place `pages` pages further on.
    fn skip(self, pages: u64) -> Self {
        match self {
            Self::Absent => Self::Absent,
            Self::Zero => Self::Zero,
            Self::Ticket { ticket, page } => Self::Ticket { ticket, page: page + pages as u16 },
            Self::Older { pack, chunk, page } => Self::Older { pack, chunk, page: page + pages as u16 },
            Self::Same { of, page } => Self::Same { of, page: page + pages },
        }
    }
}

/// Neighbouring pages whose content is in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    page: u64,
    count: u32,
    /// Did it come from [`PageTable::share`]?
    shared: bool,
    place: Place,
}

impl Span {
    fn end(&self) -> u64 {
        self.page + u64::from(self.count)
    }

    /// What of it lies in `from..to`, which must not be empty.
    fn clip(&self, from: u64, to: u64) -> Self {
        let (page, end) = (self.page.max(from), self.end().min(to));
        let place = self.place.skip(page - self.page);
        Self { page, count: (end - page) as u32, place, ..*self }
    }
}

/// Appends a span, joined with the one before where it continues it.
fn push(spans: &mut Vec<Span>, span: Span) {
    if let Some(last) = spans.last_mut() {
        let follows = (last.end(), last.shared) == (span.page, span.shared)
            && last.place.skip(last.count.into()) == span.place;
        if let (true, Some(count)) = (follows, last.count.checked_add(span.count)) {
            last.count = count;
            return;
        }
    }
    spans.push(span);
}

/// Where something is noted: in an object, with or without precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: MemoryId,
    /// Does it give way to everything that is not inherited?
    pub(super) inherited: bool,
}

impl From<MemoryId> for Target {
    fn from(id: MemoryId) -> Self {
        Self { id, inherited: false }
    }
}

/// One object: what is noted later wins, and anything noted wins over what is inherited.
#[derive(Default)]
struct Object {
    inherited: Vec<Span>,
    noted: Vec<Span>,
}

impl Object {
    fn flatten(mut self) -> Vec<Span> {
        self.inherited.append(&mut self.noted);
        flatten(self.inherited)
    }
}

/// Where a chunk has ended up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) pack: Pack,
    pub(super) chunk: u32,
    /// Had another chunk of this writer the same content before?
    pub(super) again: bool,
}

/// A pack, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pack {
    /// Of this writer.
    Own(u32),
    /// Of the base whose chunks need not be written again.
    OfBase(u32),
}

/// All objects of a part.
#[derive(Default)]
pub(super) struct PageTable {
    objects: BTreeMap<MemoryId, Object>,
    older: Vec<Digest>,
    numbers: HashMap<Digest, u32>,
}

/// What [`PageTable::finish`] makes.
#[derive(Default)]
pub(super) struct PageMaps {
    pub(super) maps: BTreeMap<MemoryId, PageMapBuilder>,
    /// Packs that the maps point into.
    pub(super) packs: Vec<Digest>,
    /// Pages with content, wherever it is.
    pub(super) data: u64,
    /// Pages full of zeros.
    pub(super) zero: u64,
    /// Of the pages with content: those in older packs.
    pub(super) inherited: u64,
    /// Of the pages with content: those that have it from another page of the part.
    pub(super) shared: u64,
}

fn refuse(why: String) -> FormatError {
    FormatError::TooLarge { what: "page map", why }
}

impl PageTable {
    /// Declares an object.
    pub(super) fn declare(&mut self, id: MemoryId) -> Result<(), FormatError> {
        if self.objects.contains_key(&id) {
            return Err(refuse(format!("memory object {} is written twice", id.0)));
        }
        self.objects.insert(id, Object::default());
        Ok(())
    }

    fn object(&mut self, id: MemoryId, page: u64, count: u64) -> Result<&mut Object, FormatError> {
        if page.checked_add(count).is_none_or(|end| end > PAGE_LIMIT) {
            return Err(refuse(format!("{count} pages at {page:#x} reach too far")));
        }
        let unknown = || refuse(format!("pages of memory object {}, which is not declared", id.0));
        self.objects.get_mut(&id).ok_or_else(unknown)
    }

    /// Can pages of this object be noted?
    pub(super) fn check(&mut self, id: MemoryId, page: u64, count: u64) -> Result<(), FormatError> {
        self.object(id, page, count).map(drop)
    }

    /// Notes where pages are; this replaces what was noted of them before.
    pub(super) fn note(
        &mut self,
        to: impl Into<Target>,
        page: u64,
        count: u32,
        place: Place,
    ) -> Result<(), FormatError> {
        if let Place::Same { of, page } = place {
            let end = page.checked_add(count.into());
            if end.is_none_or(|end| end > PAGE_LIMIT) {
                return Err(refuse(format!("{count} pages at {page:#x} of object {} reach too far", of.0)));
            }
        }
        let to = to.into();
        let object = self.object(to.id, page, count.into())?;
        if count > 0 {
            let spans = if to.inherited { &mut object.inherited } else { &mut object.noted };
            push(spans, Span { page, count, shared: false, place });
        }
        Ok(())
    }

    /// Notes pages that are where an older part has them; `packs` are that part's.
    pub(super) fn inherit(
        &mut self,
        id: MemoryId,
        packs: &[Digest],
        runs: &[PageRun],
    ) -> Result<(), FormatError> {
        self.object(id, 0, 0)?;
        let mut numbers = BTreeMap::new();
        for run in runs {
            let (page, count) = (run.page.get(), run.count.get());
            let place = match run.source() {
                Source::Zero => Place::Zero,
                Source::Chunk { pack, chunk, page } => {
                    let number = match numbers.get(&pack) {
                        Some(&number) => number,
                        None => {
                            let missing = || refuse(format!("the older part has no pack {pack}"));
                            let number = self.number(*packs.get(pack as usize).ok_or_else(missing)?);
                            numbers.insert(pack, number);
                            number
                        }
                    };
                    Place::Older { pack: number, chunk, page }
                }
            };
            let object = self.object(id, page, count.into())?;
            if count > 0 {
                push(&mut object.inherited, Span { page, count, shared: false, place });
            }
        }
        Ok(())
    }

    fn number(&mut self, pack: Digest) -> u32 {
        let next = self.older.len() as u32;
        let number = *self.numbers.entry(pack).or_insert(next);
        if number == next {
            self.older.push(pack);
        }
        number
    }

    /// Complete page maps. `stored` says for each ticket where its chunk is, `own` are the packs of
    /// this writer, and come first; `base` those of its base.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`] if a page is shared that its source has not: an error of the caller.
    pub(super) fn finish(
        mut self,
        own: Vec<Digest>,
        base: &[Digest],
        stored: &[Option<Stored>],
    ) -> Result<PageMaps, FormatError> {
        let objects = std::mem::take(&mut self.objects).into_iter();
        let mut objects: BTreeMap<_, _> = objects.map(|(id, object)| (id, object.flatten())).collect();
        for spans in objects.values_mut() {
            spans.retain(|span| span.place != Place::Absent);
        }
        resolve(&mut objects)?;
        let base: Vec<_> = base.iter().map(|&pack| self.number(pack)).collect();
        let mut done = PageMaps { packs: own, ..Default::default() };
        let mut used = vec![None; self.older.len()];
        for (id, spans) in objects {
            let mut map = PageMapBuilder::default();
            for span in spans {
                let count = u64::from(span.count);
                let mut shared = span.shared;
                let mut older = |pack: u32, done: &mut PageMaps| {
                    done.inherited += count;
                    *used[pack as usize].get_or_insert_with(|| {
                        done.packs.push(self.older[pack as usize]);
                        done.packs.len() as u32 - 1
                    })
                };
                let source = match span.place {
                    Place::Zero => Source::Zero,
                    Place::Ticket { ticket, page } => {
                        let lost = || refuse(format!("chunk {ticket} was never stored"));
                        let place = stored.get(ticket as usize).copied().flatten().ok_or_else(lost)?;
                        shared |= place.again;
                        let pack = match place.pack {
                            Pack::Own(pack) => pack,
                            Pack::OfBase(pack) => older(base[pack as usize], &mut done),
                        };
                        Source::Chunk { pack, chunk: place.chunk, page }
                    }
                    Place::Older { pack, chunk, page } => {
                        Source::Chunk { pack: older(pack, &mut done), chunk, page }
                    }
                    Place::Same { .. } | Place::Absent => {
                        return Err(refuse(format!("pages of memory object {} are not resolved", id.0)));
                    }
                };
                match source {
                    Source::Zero => done.zero += count,
                    Source::Chunk { .. } => {
                        done.data += count;
                        done.shared += if shared { count } else { 0 };
                    }
                }
                map.push(span.page, span.count, source)?;
            }
            done.maps.insert(id, map);
        }
        Ok(done)
    }
}

/// Ascending spans without overlap: of several spans with a page, the last in the list has it.
fn flatten(spans: Vec<Span>) -> Vec<Span> {
    if spans.is_sorted_by(|a, b| a.end() <= b.page) {
        return spans;
    }
    let mut order: Vec<usize> = (0..spans.len()).collect();
    order.sort_by_key(|&index| spans[index].page);
    let mut coming = order.into_iter().peekable();
    // Those that have begun; the one that counts is on top.
    let (mut begun, mut flat, mut at) = (BinaryHeap::<usize>::new(), Vec::new(), 0);
    loop {
        while let Some(index) = coming.next_if(|&index| spans[index].page <= at) {
            begun.push(index);
        }
        match (begun.peek(), coming.peek()) {
            (Some(&top), _) if spans[top].end() <= at => {
                begun.pop();
            }
            (Some(&top), next) => {
                let end = next.map_or(u64::MAX, |&next| spans[next].page).min(spans[top].end());
                push(&mut flat, spans[top].clip(at, end));
                at = end;
            }
            (None, Some(&next)) => at = spans[next].page,
            (None, None) => return flat,
        }
    }
}

/// Replaces shared pages by what their source has, until no shared page is left.
fn resolve(objects: &mut BTreeMap<MemoryId, Vec<Span>>) -> Result<(), FormatError> {
    for _ in 0..PASSES {
        let mut changed = Vec::new();
        for (&id, spans) in &*objects {
            if spans.iter().any(|span| matches!(span.place, Place::Same { .. })) {
                changed.push((id, resolve_once(objects, spans)?));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        objects.extend(changed);
    }
    Err(refuse("pages are shared in a circle".into()))
}

fn resolve_once(objects: &BTreeMap<MemoryId, Vec<Span>>, spans: &[Span]) -> Result<Vec<Span>, FormatError> {
    let mut resolved = Vec::with_capacity(spans.len());
    for span in spans {
        let Place::Same { of, page } = span.place else {
            push(&mut resolved, *span);
            continue;
        };
        let missing = |page: u64| refuse(format!("memory object {} has no page {page:#x} to share", of.0));
        let source = objects.get(&of).ok_or_else(|| missing(page))?;
        let (mut at, end) = (page, page + u64::from(span.count));
        let first = source.partition_point(|source| source.end() <= page);
        for source in source[first..].iter().take_while(|source| source.page < end) {
            let piece = source.clip(page, end);
            if piece.page != at {
                return Err(missing(at));
            }
            at = piece.end();
            push(&mut resolved, Span { page: span.page + (piece.page - page), shared: true, ..piece });
        }
        if at != end {
            return Err(missing(at));
        }
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PACKS: [Digest; 2] = [Digest([1; 32]), Digest([2; 32])];

    /// Content of a page as (pack, chunk, page in chunk), or `None` for zeros.
    type Model = BTreeMap<(u32, u64), Option<(Digest, u32, u16)>>;

    fn model_of(maps: &PageMaps) -> Model {
        let mut model = Model::new();
        for (id, map) in &maps.maps {
            let runs = ckpt_common::image::pages::parse(map.as_bytes(), maps.packs.len()).unwrap();
            for run in runs {
                for n in 0..run.count.get() {
                    let content = match run.source() {
                        Source::Zero => None,
                        Source::Chunk { pack, chunk, page } => {
                            Some((maps.packs[pack as usize], chunk, page + n as u16))
                        }
                    };
                    assert_eq!(model.insert((id.0, run.page.get() + u64::from(n)), content), None);
                }
            }
        }
        model
    }

    fn own_chunk(chunk: u32) -> Stored {
        Stored { pack: Pack::Own(0), chunk, again: false }
    }

    fn ticket(ticket: u64, page: u16) -> Place {
        Place::Ticket { ticket, page }
    }

    #[test]
    fn a_chain_of_shared_pages_of_any_length_resolves_and_a_circle_does_not() {
        let stored = [Some(own_chunk(0))];
        let chain = |last: Place| {
            let mut table = PageTable::default();
            for id in 0..1000 {
                table.declare(MemoryId(id)).unwrap();
                let place = if id == 999 {
                    last
                } else {
                    Place::Same { of: MemoryId(id + 1), page: u64::from(id) + 1 }
                };
                table.note(MemoryId(id), id.into(), 3, place).unwrap();
            }
            table.finish(vec![PACKS[0]], &[], &stored)
        };
        let maps = chain(ticket(0, 4)).unwrap();
        assert_eq!((maps.data, maps.shared), (3000, 2997));
        assert_eq!(model_of(&maps)[&(0, 2)], Some((PACKS[0], 0, 6)));
        let error = chain(Place::Same { of: MemoryId(0), page: 0 }).err().unwrap();
        assert!(error.to_string().contains("shared in a circle"), "{error}");
        let error = chain(Place::Same { of: MemoryId(0), page: 1 }).err().unwrap();
        assert!(error.to_string().contains("has no page 0x3 to share"), "{error}");
        let error = chain(Place::Same { of: MemoryId(4711), page: 1 }).err().unwrap();
        assert!(error.to_string().contains("memory object 4711 has no page 0x1"), "{error}");
    }

    #[test]
    fn packs_that_nothing_points_into_any_more_are_left_out() {
        let mut table = PageTable::default();
        table.declare(MemoryId(0)).unwrap();
        let run = |page, pack| PageRun::new(page, 2, Source::Chunk { pack, chunk: 7, page: 3 });
        table.inherit(MemoryId(0), &PACKS, &[run(10, 0), run(20, 1)]).unwrap();
        table.note(MemoryId(0), 9, 4, Place::Zero).unwrap();
        assert!(table.inherit(MemoryId(0), &PACKS, &[run(10, 2)]).is_err());
        assert!(table.inherit(MemoryId(1), &PACKS, &[]).is_err());
        let maps = table.finish(Vec::new(), &[], &[]).unwrap();
        assert_eq!(maps.packs, [PACKS[1]]);
        assert_eq!((maps.data, maps.zero, maps.inherited, maps.shared), (2, 4, 2, 0));
        assert_eq!(model_of(&maps)[&(0, 21)], Some((PACKS[1], 7, 4)));
    }

    #[test]
    fn pages_that_cannot_be_are_refused() {
        let mut table = PageTable::default();
        table.declare(MemoryId(0)).unwrap();
        assert!(table.note(MemoryId(0), PAGE_LIMIT - 1, 2, Place::Zero).is_err());
        assert!(table.note(MemoryId(0), u64::MAX, 1, Place::Zero).is_err());
        let place = Place::Same { of: MemoryId(0), page: u64::MAX };
        assert!(table.note(MemoryId(0), 0, 1, place).is_err());
        let run = PageRun::new(u64::MAX, 1, Source::Zero);
        assert!(table.inherit(MemoryId(0), &[], &[run]).is_err());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Note(u32, u64, u32, Option<(u64, u16)>),
        Share(u32, u64, u32, u64),
        Inherit(u32, u64, u32, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let place = proptest::option::of((0u64..4, 0u16..8));
        prop_oneof![
            (0u32..3, 0u64..40, 1u32..9, place)
                .prop_map(|(id, page, n, place)| Step::Note(id, page, n, place)),
            // Only of object 3, which has all pages and shares none.
            (0u32..3, 0u64..40, 1u32..9, 0u64..40).prop_map(|(id, page, n, of)| Step::Share(id, page, n, of)),
            (0u32..3, 0u64..40, 1u32..9, 0u32..2)
                .prop_map(|(id, page, n, pack)| Step::Inherit(id, page, n, pack)),
        ]
    }

    proptest! {
        /// Page by page against a map of maps.
        #[test]
        fn any_order_gives_what_was_noted_last(steps in proptest::collection::vec(step(), 0..40)) {
            let own = Digest([9; 32]);
            let stored: Vec<_> = (0..4).map(|chunk| Some(own_chunk(chunk))).collect();
            let (mut table, mut inherited, mut noted) = (PageTable::default(), Model::new(), Model::new());
            for id in 0..4 {
                table.declare(MemoryId(id)).unwrap();
            }
            for page in 0..60 {
                table.note(MemoryId(3), page, 1, ticket(page % 4, (page / 4) as u16)).unwrap();
                noted.insert((3, page), Some((own, (page % 4) as u32, (page / 4) as u16)));
            }
            for step in steps {
                match step {
                    Step::Note(id, page, count, None) => {
                        table.note(MemoryId(id), page, count, Place::Zero).unwrap();
                        noted.extend((page..page + u64::from(count)).map(|page| ((id, page), None)));
                    }
                    Step::Note(id, page, count, Some((number, first))) => {
                        table.note(MemoryId(id), page, count, ticket(number, first)).unwrap();
                        noted.extend((0..count).map(|n| {
                            ((id, page + u64::from(n)), Some((own, number as u32, first + n as u16)))
                        }));
                    }
                    Step::Share(id, page, count, of) => {
                        let place = Place::Same { of: MemoryId(3), page: of };
                        table.note(MemoryId(id), page, count, place).unwrap();
                        for n in 0..u64::from(count) {
                            noted.insert((id, page + n), noted[&(3, of + n)]);
                        }
                    }
                    Step::Inherit(id, page, count, pack) => {
                        let run = PageRun::new(page, count, Source::Chunk { pack, chunk: 5, page: 1 });
                        table.inherit(MemoryId(id), &PACKS, &[run]).unwrap();
                        inherited.extend((0..count).map(|n| {
                            ((id, page + u64::from(n)), Some((PACKS[pack as usize], 5, 1 + n as u16)))
                        }));
                    }
                }
            }
            let maps = table.finish(vec![own], &[], &stored).unwrap();
            inherited.extend(noted);
            prop_assert_eq!(maps.zero, inherited.values().filter(|content| content.is_none()).count() as u64);
            prop_assert_eq!(maps.data + maps.zero, inherited.len() as u64);
            prop_assert_eq!(model_of(&maps), inherited);
        }
    }
}
