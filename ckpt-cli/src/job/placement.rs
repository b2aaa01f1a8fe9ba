//! Which node takes the place of which at a restart.

use super::JobError;

/// Finds the new node for each old one.
///
/// `places` are pairs of old and new node (`--place OLD=NEW`). `nodes` (`--nodes`), where given, are
/// the nodes to use: old nodes that are among them stay, the others take the remaining ones in
/// order. Otherwise a node that is not placed stays where it was.
///
/// # Errors
/// [`JobError::BadPlacement`] for a node that was not part of the dump, a node that would get two
/// parts, or too few nodes.
pub fn place(
    old: &[String],
    places: &[(String, String)],
    nodes: Option<&[String]>,
) -> Result<Vec<String>, JobError> {
    let bad = |why: String| Err(JobError::BadPlacement(why));
    for (index, (from, _)) in places.iter().enumerate() {
        if !old.contains(from) {
            return bad(format!("{from} is not part of the checkpoint (its nodes: {})", old.join(", ")));
        }
        if places[..index].iter().any(|(other, _)| other == from) {
            return bad(format!("{from} is placed twice"));
        }
    }
    let placed = |node: &String| places.iter().find(|(from, _)| from == node).map(|(_, to)| to.clone());
    let mut new: Vec<Option<String>> = old.iter().map(placed).collect();
    for (node, new) in old.iter().zip(&mut new) {
        if new.is_none() && nodes.is_none_or(|nodes| nodes.contains(node)) {
            *new = Some(node.clone());
        }
    }
    let taken: Vec<String> = new.iter().flatten().cloned().collect();
    let mut free = nodes.unwrap_or_default().iter().filter(|node| !taken.contains(node));
    for (node, new) in old.iter().zip(&mut new) {
        if new.is_none() {
            *new = free.next().cloned();
        }
        if new.is_none() {
            return bad(format!("there is no node left for what ran on {node}"));
        }
    }
    let new: Vec<String> = new.into_iter().flatten().collect();
    for (index, node) in new.iter().enumerate() {
        if let Some(other) = new[..index].iter().position(|other| other == node) {
            let (a, b) = (&old[other], &old[index]);
            return bad(format!("{node} would take the place of both {a} and {b}"));
        }
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn run(old: &str, places: &[(&str, &str)], nodes: Option<&str>) -> Result<String, String> {
        let places: Vec<_> = places.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        let nodes = nodes.map(names);
        place(&names(old), &places, nodes.as_deref())
            .map(|new| new.join(" "))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn everyone_stays_unless_told_otherwise() {
        assert_eq!(run("a b", &[], None).unwrap(), "a b");
        assert_eq!(run("a b", &[("b", "c")], None).unwrap(), "a c");
        assert_eq!(run("a b", &[("a", "b"), ("b", "a")], None).unwrap(), "b a");
        assert_eq!(run("a b c", &[], Some("x b y")).unwrap(), "x b y");
        assert_eq!(run("a b", &[("a", "x")], Some("y")).unwrap(), "x y");
    }

    #[test]
    fn mistakes_are_named() {
        let error = run("a b", &[("c", "d")], None).unwrap_err();
        assert_eq!(error, "cannot place the job: c is not part of the checkpoint (its nodes: a, b)");
        let error = run("a b", &[("a", "b")], None).unwrap_err();
        assert_eq!(error, "cannot place the job: b would take the place of both a and b");
        assert!(run("a b", &[("a", "x"), ("a", "y")], None).is_err());
        let error = run("a b", &[], Some("a")).unwrap_err();
        assert_eq!(error, "cannot place the job: there is no node left for what ran on b");
    }
}
