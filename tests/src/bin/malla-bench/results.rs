//! What came of the measurements: as a table for people and as JSON.

mod measure;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

pub(crate) use self::measure::{Measure, Place, Side};
use crate::stats::Spread;
use crate::usage::Part;

use Measure::{
    BesideP50, Bulk1, CpuPerGb1, NewBy1, NewDecayBy1, NewDecayBy16, NewFailed, P50Of1, RateOf64,
    RssIdle, RssPerIdleClient, RssPerIdleServer,
};

/// All runs.
#[derive(Debug, Default)]
pub(crate) struct Results(BTreeMap<Measure, BTreeMap<Side, Vec<f64>>>);

impl Results {
    /// Adds a run of `measure` on `side`.
    pub(crate) fn add(&mut self, side: Side, measure: Measure, value: f64) {
        self.0.entry(measure).or_default().entry(side).or_default().push(value);
    }

    fn spread(&self, measure: Measure, side: Side) -> Option<Spread> {
        Spread::of(self.0.get(&measure)?.get(&side)?)
    }

    /// The mesh's median by that of plain TCP in the same place, of what is a quantity: not of a ratio, nor of failures.
    fn ratio(&self, measure: Measure, side: Side) -> Option<f64> {
        if matches!(measure, NewDecayBy1 | NewDecayBy16 | NewFailed) {
            return None;
        }
        let plain = self.spread(measure, side.place().baseline())?.median;
        Some(self.spread(measure, side)?.median / plain).filter(|ratio| ratio.is_finite())
    }

    /// The sides that ran in `place`, plain first.
    fn sides(&self, place: Place) -> Vec<Side> {
        let mut sides: Vec<_> = self.0.values().flat_map(BTreeMap::keys).copied().collect();
        sides.retain(|side| side.place() == place);
        sides.sort_unstable();
        sides.dedup();
        sides
    }

    /// A table for each place: medians with their spread, and each mesh's median by plain's.
    pub(crate) fn markdown(&self) -> String {
        let [across, same_node] = Place::BOTH.map(|place| self.table(place));
        match (across.is_empty(), same_node.is_empty()) {
            (_, true) => across,
            (true, false) => format!("Same node\n\n{same_node}"),
            (false, false) => format!("{across}\nSame node\n\n{same_node}"),
        }
    }

    fn table(&self, place: Place) -> String {
        let sides = self.sides(place);
        if sides.is_empty() {
            return String::new();
        }
        let plain = place.baseline();
        let meshes: Vec<_> = sides.iter().copied().filter(|side| *side != plain).collect();
        let compared = if sides.contains(&plain) { meshes.as_slice() } else { &[] };

        let mut text = "| measure | unit |".to_owned();
        // Writing to a `String` cannot fail.
        for side in &sides {
            let _always_ok = write!(text, " {} |", side.name());
        }
        for side in compared {
            let _always_ok = write!(text, " {} \u{f7} {} |", side.name(), plain.name());
        }
        text.push_str("\n|---|---|");
        text.push_str(&"---|".repeat(sides.len() + compared.len()));
        text.push('\n');
        for (measure, measured) in &self.0 {
            if !sides.iter().any(|side| measured.contains_key(side)) {
                continue;
            }
            let (_, label, unit) = measure.spec();
            let _always_ok = write!(text, "| {label} | {unit} |");
            for side in &sides {
                let cell = self.spread(*measure, *side).map_or_else(|| "-".to_owned(), cell);
                let _always_ok = write!(text, " {cell} |");
            }
            for side in compared {
                let ratio = self.ratio(*measure, *side);
                let cell = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
                let _always_ok = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        text
    }

    /// The same for programs. A ratio that was not measured is `null`.
    pub(crate) fn json(&self, machine: &Value) -> Value {
        let mut rows = Vec::new();
        for (measure, sides) in &self.0 {
            let (name, _, unit) = measure.spec();
            for (side, values) in sides {
                let Some(Spread { median, min, max, runs }) = Spread::of(values) else {
                    continue;
                };
                let (side, prefix) = side.in_json();
                rows.push(json!({
                    "measure": format!("{prefix}{name}"), "side": side, "unit": unit,
                    "median": median, "min": min, "max": max, "runs": runs,
                }));
            }
        }
        json!({ "machine": machine, "rows": rows, "ratios": self.ratios() })
    }

    /// The figures that bars are set for, of the better carrier and of the direct way: ratios to
    /// plain, and three that have no counterpart there (`small_beside_bulk_ms`, `rss_...`) as they
    /// are.
    fn ratios(&self) -> Value {
        let carriers = [Side::Lane, Side::Quic];
        let ratios = |measure| carriers.into_iter().filter_map(move |at| self.ratio(measure, at));
        let least = |measure| ratios(measure).min_by(f64::total_cmp);
        let most = |measure| ratios(measure).max_by(f64::total_cmp);
        let median = |measure, side| self.spread(measure, side).map(|spread| spread.median);
        let least_of = |measures: &[Measure]| {
            let worse = |side| {
                let each = measures.iter().filter_map(|one| median(*one, side));
                each.max_by(f64::total_cmp)
            };
            carriers.into_iter().filter_map(worse).min_by(f64::total_cmp)
        };
        let measured = [
            ("p50_64b", least(P50Of1)),
            ("bulk_1", most(Bulk1)),
            ("cpu_per_gb", least(CpuPerGb1(Part::Machine))),
            ("rate_64", most(RateOf64)),
            ("new_conns_1", most(NewBy1)),
            ("small_beside_bulk_ms", least_of(&[BesideP50])),
            ("rss_idle_mb", least_of(&[RssIdle])),
            ("rss_per_idle_conn_kb", least_of(&[RssPerIdleClient, RssPerIdleServer])),
            ("direct_p50_64b", self.ratio(P50Of1, Side::Direct)),
            ("direct_bulk_1", self.ratio(Bulk1, Side::Direct)),
            ("direct_new_conns_1", self.ratio(NewBy1, Side::Direct)),
            ("redirect_peer_p50_64b", self.ratio(P50Of1, Side::Redirect)),
            ("redirect_peer_bulk_1", self.ratio(Bulk1, Side::Redirect)),
        ];
        let ratios = measured.into_iter().map(|(name, value)| (name.to_owned(), json!(value)));
        Value::Object(ratios.collect::<Map<_, _>>())
    }
}

/// `median (min..max)`, or the one value of one run.
fn cell(spread: Spread) -> String {
    let Spread { median, min, max, runs } = spread;
    match runs {
        1 => figure(median),
        _ => format!("{} ({}..{})", figure(median), figure(min), figure(max)),
    }
}

/// Three figures that matter, and thousands set apart.
fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        at_least if at_least >= 100.0 || at_least == 0.0 => 0,
        at_least if at_least >= 10.0 => 1,
        at_least if at_least >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let whole = text.find('.').unwrap_or(text.len());
    text.char_indices().fold(String::new(), |mut grouped, (at, digit)| {
        if at > 0 && at < whole && (whole - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
        grouped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let mut results = Results::default();
        for value in [10.0, 30.0, 20.0] {
            results.add(Side::Plain, P50Of1, value);
            results.add(Side::Lane, P50Of1, value * 2.0);
            results.add(Side::Quic, P50Of1, value * 3.0);
        }
        results.add(Side::Plain, RateOf64, 200_000.0);
        results.add(Side::Lane, RateOf64, 50_000.0);
        results.add(Side::Quic, RateOf64, 80_000.0);
        for (side, client, server) in [(Side::Lane, 3.0, 7.0), (Side::Quic, 6.0, 5.0)] {
            results.add(side, RssPerIdleClient, client);
            results.add(side, RssPerIdleServer, server);
        }
        results
    }

    #[test]
    fn the_table_has_medians_spreads_and_ratios() {
        let table = results().markdown();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(
            lines[0],
            "| measure | unit | plain | lane | quic | lane \u{f7} plain | quic \u{f7} plain |"
        );
        assert_eq!(
            lines[2],
            "| 64 B exchange, 1 connection: p50 | us | 20.0 (10.0..30.0) | 40.0 (20.0..60.0) | \
             60.0 (30.0..90.0) | 2.00 | 3.00 |"
        );
        assert_eq!(
            lines[3],
            "| 64 B exchanges, 64 connections | 1/s | 200,000 | 50,000 | 80,000 | 0.25 | 0.40 |"
        );
        assert!(lines[4].contains("| - | 3.00 | 6.00 | - | - |"), "{}", lines[4]);
    }

    #[test]
    fn the_cpu_of_each_process_is_a_row_below_the_whole_machines() {
        let mut results = Results::default();
        for (part, value) in
            [(Part::ServerAgent, 0.4), (Part::ClientProgram, 0.2), (Part::Machine, 1.0)]
        {
            results.add(Side::Lane, CpuPerGb1(part), value);
        }
        results.add(Side::Plain, CpuPerGb1(Part::ClientProgram), 0.1);
        let table = results.markdown();
        let lines: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(
            lines,
            [
                "| CPU, 1 connection: whole machine | s/GB | - | 1.00 | - |",
                "| ... client's program | s/GB | 0.100 | 0.200 | 2.00 |",
                "| ... server's agent | s/GB | - | 0.400 | - |",
            ]
        );
        let json = results.json(&json!({}));
        let rows = json["rows"].as_array().unwrap().iter();
        let named: Vec<_> = rows.map(|row| row["measure"].as_str().unwrap()).collect();
        assert_eq!(
            named,
            [
                "cpu_per_gb",
                "cpu_per_gb_client_program",
                "cpu_per_gb_client_program",
                "cpu_per_gb_server_agent",
            ]
        );
    }

    #[test]
    fn a_decay_is_not_compared() {
        let mut results = Results::default();
        for side in [Side::Plain, Side::Lane] {
            results.add(side, NewDecayBy1, 1.0);
        }
        assert!(results.markdown().ends_with("| x | 1.00 | 1.00 | - |\n"));
    }

    #[test]
    fn without_plain_nothing_is_compared() {
        let mut results = Results::default();
        results.add(Side::Lane, Bulk1, 1.0);
        assert!(!results.markdown().contains('\u{f7}'));
        assert!(results.json(&json!({}))["ratios"]["bulk_1"].is_null());
    }

    #[test]
    fn the_json_has_rows_and_the_better_carriers_ratios() {
        let json = results().json(&json!({ "cores": 2 }));
        assert_eq!(json["machine"]["cores"], 2);
        assert_eq!(
            json["rows"][1],
            json!({
                "measure": "p50_64b", "side": "lane", "unit": "us",
                "median": 40.0, "min": 20.0, "max": 60.0, "runs": 3,
            })
        );
        let ratios = &json["ratios"];
        assert_eq!(ratios["p50_64b"], 2.0);
        assert_eq!(ratios["rate_64"], 0.4);
        assert_eq!(ratios["rss_per_idle_conn_kb"], 6.0);
        assert!(ratios["bulk_1"].is_null());
        let mut names: Vec<_> = ratios.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "bulk_1",
                "cpu_per_gb",
                "direct_bulk_1",
                "direct_new_conns_1",
                "direct_p50_64b",
                "new_conns_1",
                "p50_64b",
                "rate_64",
                "redirect_peer_bulk_1",
                "redirect_peer_p50_64b",
                "rss_idle_mb",
                "rss_per_idle_conn_kb",
                "small_beside_bulk_ms",
            ]
        );
    }

    #[test]
    fn the_same_node_has_a_table_and_a_baseline_of_its_own() {
        let mut results = results();
        results.add(Side::Near, P50Of1, 10.0);
        results.add(Side::Direct, P50Of1, 9.0);
        let table = results.markdown();
        let (across, same_node) = table.split_once("\nSame node\n\n").unwrap();
        assert_eq!(across, self::results().markdown(), "the other table is as without it");
        let lines: Vec<_> = same_node.lines().collect();
        assert_eq!(lines[0], "| measure | unit | near | direct | direct \u{f7} near |");
        assert_eq!(lines[2], "| 64 B exchange, 1 connection: p50 | us | 10.0 | 9.00 | 0.90 |");
        assert_eq!(lines.len(), 3, "what was not measured there has no row: {same_node}");
    }

    #[test]
    fn the_same_node_alone_is_one_table() {
        let mut results = Results::default();
        results.add(Side::Direct, P50Of1, 9.0);
        let table = results.markdown();
        assert!(table.starts_with("Same node\n\n| measure | unit | direct |\n"), "{table}");
    }

    #[test]
    fn in_the_json_the_same_node_is_a_prefix_and_the_bars_compare_with_it() {
        let mut results = results();
        for (near, direct, measure) in
            [(10.0, 9.0, P50Of1), (20.0, 21.0, Bulk1), (8000.0, 7000.0, NewBy1)]
        {
            results.add(Side::Near, measure, near);
            results.add(Side::Direct, measure, direct);
            results.add(Side::Redirect, measure, near * 0.75);
        }
        let json = results.json(&json!({}));
        let row = |measure, side| {
            let rows = json["rows"].as_array().unwrap().iter();
            let mut rows = rows.filter(|row| row["measure"] == measure && row["side"] == side);
            rows.next().map(|row| row["median"].clone())
        };
        assert_eq!(row("same_node_p50_64b", "plain"), Some(json!(10.0)));
        assert_eq!(row("same_node_p50_64b", "direct"), Some(json!(9.0)));
        assert_eq!(row("p50_64b", "plain"), Some(json!(20.0)), "across nodes");
        assert_eq!(row("p50_64b", "direct"), None);
        let ratios = &json["ratios"];
        assert_eq!(ratios["p50_64b"], 2.0, "across nodes");
        assert_eq!(ratios["direct_p50_64b"], 0.9);
        assert_eq!(ratios["direct_bulk_1"], 1.05);
        assert_eq!(ratios["direct_new_conns_1"], 0.875);
        assert_eq!(row("same_node_p50_64b", "redirect"), Some(json!(7.5)));
        assert_eq!(ratios["redirect_peer_p50_64b"], 0.75);
        assert_eq!(ratios["redirect_peer_bulk_1"], 0.75);
    }

    #[test]
    fn figures_show_what_matters() {
        let shown = [0.0, 0.1234, 1.234, 12.34, 123.4, 12_345.0, 1_234_567.0].map(figure);
        assert_eq!(shown, ["0", "0.123", "1.23", "12.3", "123", "12,345", "1,234,567"]);
    }
}
