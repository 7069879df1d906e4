//! Columns and figures for the terminal.

/// Rows under `head`, in columns as wide as need be; a heading that begins with `>` is of a column
/// of figures, which are aligned at their right end. Ends with a line feed.
pub(crate) fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let titles = head.iter().map(|title| title.trim_start_matches('>').to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(titles).chain(rows).collect();
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in &lines {
        let mut row = String::from(" ");
        for ((cell, title), width) in line.iter().zip(head).zip(&widths) {
            if title.starts_with('>') {
                row.push_str(&format!(" {cell:>width$} "));
            } else {
                row.push_str(&format!(" {cell:<width$} "));
            }
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// A heading with a rule under it.
pub(crate) fn heading(title: &str) -> String {
    format!("\n{title}\n{}\n", "\u{2500}".repeat(title.chars().count()))
}

/// A count, thousands set apart.
pub(crate) fn amount(count: u64) -> String {
    let digits = count.to_string();
    digits.char_indices().fold(String::new(), |mut grouped, (at, digit)| {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
        grouped
    })
}

/// Bytes in the unit that suits them.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
pub(crate) fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count as f64 / 1024.0),
        _ => format!("{:.1} MiB", count as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows =
            [vec!["a".to_owned(), "5".to_owned()], vec!["longer".to_owned(), "12".to_owned()]];
        let text = table(&["NAME", ">N"], rows.into_iter());
        assert_eq!(text, "  NAME     N\n  a        5\n  longer  12\n");
    }

    #[test]
    fn figures_have_units_and_groups() {
        assert_eq!(amount(1_234_567), "1,234,567");
        assert_eq!(amount(12), "12");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
    }
}
