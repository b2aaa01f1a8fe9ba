//! Numbers as people like to read them.

use std::time::{Duration, SystemTime};

/// `212 MiB`: three digits are enough.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 99.95);
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// `11 ms`, `1.9 s`, `2 min 5 s`.
pub fn duration(duration: Duration) -> String {
    let us = duration.as_micros();
    match us {
        0..1_000 => format!("{us} us"),
        1_000..10_000 => format!("{:.1} ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", us / 1_000),
        1_000_000..100_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => format!("{} min {} s", us / 60_000_000, us / 1_000_000 % 60),
    }
}

/// `2026-11-23 17:23:11 UTC`, from seconds since 1970.
pub fn date(seconds: u64) -> String {
    // Beyond the year 9999 the formatter panics; a manifest can say anything.
    let seconds = seconds.min(253_402_300_799);
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.replace('T', " ").replace('Z', " UTC")
}

/// `1 node`, `2 nodes`.
pub fn plural(count: usize, noun: &str) -> String {
    match (count, noun.strip_suffix("ss")) {
        (1, _) => format!("1 {noun}"),
        (_, Some(_)) => format!("{count} {noun}es"),
        _ => format!("{count} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        let texts = [0, 999, 1000, 10_240, 212 << 20, (18 << 30) + (400 << 20), u64::MAX].map(bytes);
        assert_eq!(texts, ["0 B", "999 B", "1.0 KiB", "10.0 KiB", "212 MiB", "18.4 GiB", "16.0 EiB"]);
    }

    #[test]
    fn durations_have_their_unit() {
        let texts = [7, 1_900, 11_400, 1_940_000, 125_000_000].map(|us| duration(Duration::from_micros(us)));
        assert_eq!(texts, ["7 us", "1.9 ms", "11 ms", "1.9 s", "2 min 5 s"]);
    }

    #[test]
    fn dates_are_plain_and_never_panic() {
        assert_eq!(date(1_795_454_591), "2026-11-23 17:23:11 UTC");
        assert!(date(u64::MAX).starts_with("9999-12-31"));
    }

    #[test]
    fn plurals() {
        assert_eq!(
            [plural(1, "node"), plural(2, "node"), plural(0, "process")].join(", "),
            "1 node, 2 nodes, 0 processes"
        );
    }
}
