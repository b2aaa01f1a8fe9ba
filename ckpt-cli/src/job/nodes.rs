//! Node lists: `n[01-04,7],login2`.

use super::JobError;

/// Most nodes in a list; a slip of the finger must not allocate a billion names.
const MOST: usize = 65_536;

/// Takes a list apart: names separated by commas, with ranges in brackets whose leading zeros
/// count. A name may have several brackets. Every node is named once, in the given order.
pub fn parse(list: &str) -> Result<Vec<String>, JobError> {
    let bad = |why: &str| JobError::BadList { list: list.to_owned(), why: why.to_owned() };
    let mut nodes = Vec::new();
    for name in split(list).ok_or_else(|| bad("brackets do not match"))? {
        let name = name.trim();
        if name.is_empty() {
            return Err(bad("a name is empty"));
        }
        for node in expand(name).map_err(|why| bad(&why))? {
            // It becomes an argument of ssh.
            if node.starts_with('-') || node.contains(|c: char| c.is_whitespace() || c.is_control()) {
                return Err(bad("a name begins with a dash or holds a blank"));
            }
            if nodes.contains(&node) {
                return Err(bad(&format!("{node} is named twice")));
            }
            nodes.push(node);
            if nodes.len() > MOST {
                return Err(bad("too many nodes"));
            }
        }
    }
    Ok(nodes)
}

/// Splits at commas outside brackets; nothing if brackets do not match.
fn split(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (position, c) in list.char_indices() {
        match c {
            '[' if inside => return None,
            '[' => inside = true,
            ']' if !inside => return None,
            ']' => inside = false,
            ',' if !inside => {
                parts.push(&list[start..position]);
                start = position + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    (!inside).then_some(parts)
}

fn expand(name: &str) -> Result<Vec<String>, String> {
    let Some((prefix, rest)) = name.split_once('[') else { return Ok(vec![name.to_owned()]) };
    let (ranges, suffix) = rest.split_once(']').ok_or("brackets do not match")?;
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true => text.parse::<usize>().map_err(|_| format!("`{text}` is not a number")),
            false => Err(format!("`{text}` is not a number")),
        };
        let (low, high) = (number(first)?, number(last)?);
        if low > high || high - low >= MOST {
            return Err(format!("`{range}` is not a range"));
        }
        let width = first.len();
        numbers.extend((low..=high).map(|number| format!("{number:0width$}")));
    }
    let suffixes = expand(suffix)?;
    if numbers.len().saturating_mul(suffixes.len()) > MOST {
        return Err("too many nodes".into());
    }
    let join = |number: &String| {
        let join = |suffix: &String| format!("{prefix}{number}{suffix}");
        suffixes.iter().map(join).collect::<Vec<_>>()
    };
    Ok(numbers.iter().flat_map(join).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_usual_syntax() {
        for (list, nodes) in [
            ("n1", "n1"),
            ("n[01-04,7],login2", "n01 n02 n03 n04 n7 login2"),
            ("n[8-11]", "n8 n9 n10 n11"),
            ("r[1-2]c[1-2].site", "r1c1.site r1c2.site r2c1.site r2c2.site"),
            ("user@host, other", "user@host other"),
        ] {
            assert_eq!(parse(list).unwrap().join(" "), nodes);
        }
    }

    #[test]
    fn mistakes_are_named() {
        for list in [
            "",
            "a,,b",
            "n[1-",
            "n]1[",
            "n[[1]]",
            "n[4-1]",
            "n[a]",
            "n[]",
            "a,a",
            "-oProxyCommand=x",
            "n[0-99999999999]",
            "n[1-60000]m[1-60000]",
            "a b",
        ] {
            assert!(matches!(parse(list), Err(JobError::BadList { .. })), "{list}");
        }
        let error = parse("n[4-1]").unwrap_err().to_string();
        assert_eq!(error, "`n[4-1]` is not a list of nodes: `4-1` is not a range");
    }

    proptest! {
        #[test]
        fn any_text_is_a_list_or_an_error(list in ".{0,40}") {
            let _ = parse(&list);
        }

        #[test]
        fn ranges_have_every_number_once(low in 0usize..200, length in 0usize..50) {
            let nodes = parse(&format!("n[{low}-{}]", low + length)).unwrap();
            prop_assert_eq!(nodes, (low..=low + length).map(|n| format!("n{n}")).collect::<Vec<_>>());
        }
    }
}
