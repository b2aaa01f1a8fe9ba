//! Images in which equal pages are stored once, and what processes share in memory.

use anyhow::{Context, Result, ensure};
use ckpt_cli::store::{Store, StoreError};
use ckpt_common::image::PAGE_SIZE;
use ckpt_common::image::pages::{PageMapBuilder, PageRun, Source};
use ckpt_common::image::part::PartBuilder;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

/// Rewrites a checkpoint: all pages with the same content name the same place.
pub fn store_equal_pages_once(store: &Path, name: &str) -> Result<()> {
    let store = Store::open(store)?;
    let checkpoint = store.resolve(name)?;
    let mut manifest = checkpoint.manifest.clone();
    for node in &mut manifest.nodes {
        let part = store.open_part(&node.part)?;
        let mut new = PartBuilder { packs: part.packs().to_vec(), ..PartBuilder::default() };
        for record in part.records()? {
            record.encode(&mut new.records)?;
        }
        let mut places: HashMap<Vec<u8>, Source> = HashMap::new();
        for id in part.memories() {
            let map = part.page_map(id)?;
            let content = Mutex::new(HashMap::new());
            part.scatter(&[map], |pieces| {
                let pages = pieces.iter().flat_map(|piece| (piece.page..).zip(piece.data.chunks(PAGE_SIZE)));
                content
                    .lock()
                    .expect("no thread panics")
                    .extend(pages.map(|(page, data)| (page, data.to_vec())));
                Ok::<_, StoreError>(())
            })?;
            let mut content = content.into_inner()?;
            let mut pages = PageMapBuilder::default();
            for (page, source) in map.iter().flat_map(single_pages) {
                let source = match source {
                    Source::Zero => source,
                    _ => *places.entry(content.remove(&page).context("a page is missing")?).or_insert(source),
                };
                pages.push(page, 1, source)?;
            }
            new.maps.insert(id, pages);
        }
        let (pieces, id) = new.encode([7; 16]);
        let bytes = pieces.concat();
        (node.part.id, node.part.bytes) = (id, bytes.len() as u64);
        fs::write(store.root().join(format!("parts/{id}.part")), bytes)?;
    }
    let (text, _) = manifest.encode()?;
    let path = store.root().join(format!("jobs/{}/{}.json", manifest.job, manifest.number));
    ensure!(path.exists(), "{} is not there", path.display());
    Ok(fs::write(path, text)?)
}

fn single_pages(run: &PageRun) -> impl Iterator<Item = (u64, Source)> {
    let (first, source) = (run.page.get(), run.source());
    (first..run.end()).map(move |page| match source {
        Source::Zero => (page, source),
        Source::Chunk { pack, chunk, page: place } => {
            (page, Source::Chunk { pack, chunk, page: place + (page - first) as u16 })
        }
    })
}

/// Physical memory of a tree of processes in bytes, what they share counted once (`Pss`).
pub fn physical_memory(root: i32) -> Result<u64> {
    let mut all = 0;
    for pid in ckpt_cli::tracee::proc::tree(root) {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
        all += line.trim().trim_end_matches(" kB").parse::<u64>()? << 10;
    }
    Ok(all)
}
