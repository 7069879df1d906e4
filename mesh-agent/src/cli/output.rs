//! How answers are printed: aligned tables, or JSON or YAML with stable keys.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// JSON, indented.
    Json,
    /// YAML.
    Yaml,
}

/// Rows under headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

/// Something that can be printed as a table.
pub trait Tabular: Serialize {
    /// The table.
    fn table(&self) -> Table;
}

/// Prints `value` as asked.
///
/// # Errors
///
/// If `out` cannot be written.
pub fn print<T: Tabular>(out: &mut dyn Write, format: Format, value: &T) -> io::Result<()> {
    match format {
        Format::Table => value.table().write(out),
        Format::Json | Format::Yaml => print_data(out, format, value),
    }
}

/// Prints `value` as YAML if asked, and as JSON otherwise.
///
/// # Errors
///
/// If `out` cannot be written.
pub fn print_data(out: &mut dyn Write, format: Format, value: &impl Serialize) -> io::Result<()> {
    match format {
        Format::Yaml => out.write_all(yaml(value)?.as_bytes()),
        Format::Table | Format::Json => {
            serde_json::to_writer_pretty(&mut *out, value)?;
            writeln!(out)
        }
    }
}

fn yaml(value: &impl Serialize) -> io::Result<String> {
    serde_saphyr::to_string(value).map_err(io::Error::other)
}

fn without_controls(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() {
            shown.extend(char.escape_default());
        } else {
            shown.push(char);
        }
    }
    shown
}

impl Table {
    /// An empty table.
    pub fn new(headers: impl Into<Vec<&'static str>>) -> Self {
        Self { headers: headers.into(), rows: Vec::new() }
    }

    /// Adds a row. An empty cell is shown as `-`; and what others have written tells the terminal nothing: a control
    /// character is shown as Rust writes it.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let shown = |cell: String| match cell {
            cell if cell.is_empty() => "-".into(),
            cell if cell.contains(char::is_control) => without_controls(&cell),
            cell => cell,
        };
        self.rows.push(cells.into_iter().map(shown).collect());
    }

    /// Writes it, columns aligned, three blanks between them.
    ///
    /// # Errors
    ///
    /// If `out` cannot be written.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let lines = || {
            let rows = self.rows.iter().map(|row| row.iter().map(String::as_str).collect());
            std::iter::once(self.headers.clone()).chain(rows)
        };
        let width = |column: usize| {
            let cells =
                lines().filter_map(|line: Vec<&str>| Some(line.get(column)?.chars().count()));
            cells.max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.headers.len()).map(width).collect();
        for line in lines() {
            let mut text = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                text.push_str(&format!("{cell:<width$}   "));
            }
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kubectl` had to learn it: CVE-2021-25743.
    #[test]
    fn what_others_have_written_tells_the_terminal_nothing() {
        let mut table = Table::new(["WHAT", "WHY"]);
        table.row(["\u{1b}]0;title\u{7}".into(), "two\r\nlines\t\u{9b}31m, ä".into()]);
        let mut shown = Vec::new();
        table.write(&mut shown).unwrap();
        let shown = String::from_utf8(shown).unwrap();
        let rows: Vec<_> = shown.lines().collect();
        assert_eq!(
            rows,
            [r"WHAT                  WHY", r"\u{1b}]0;title\u{7}   two\r\nlines\t\u{9b}31m, ä"]
        );
    }
}
