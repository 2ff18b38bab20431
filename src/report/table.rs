//! Tables for people: plain text, aligned columns, nothing cut.

/// Rows of text under headings. Columns whose cells are all numbers stand right-aligned.
#[derive(Debug, Clone, Default)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<S: Into<String>>(head: impl IntoIterator<Item = S>) -> Self {
        Self { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, surplus ones are kept under an empty heading.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Self {
        self.rows.push(cells.into_iter().map(Into::into).collect());
        self
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as text, a newline after each line. Control characters in cells are shown escaped, so that a file name
    /// cannot break a line.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0).max(self.head.len());
        let clean = |row: &Vec<String>| -> Vec<String> {
            (0..columns).map(|c| row.get(c).map_or(String::new(), |cell| printable(cell))).collect()
        };
        let head = clean(&self.head);
        let rows: Vec<Vec<String>> = self.rows.iter().map(clean).collect();
        let width = |c: usize| {
            rows.iter().chain([&head]).map(|r| r[c].chars().map(char_width).sum::<usize>()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let number = |c: usize| {
            let mut cells = rows.iter().map(|r| r[c].as_str()).filter(|s| !s.is_empty()).peekable();
            cells.peek().is_some() && cells.all(is_number)
        };
        let right: Vec<bool> = (0..columns).map(number).collect();
        let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
        let mut text = String::new();
        for row in [&head, &rule].into_iter().chain(&rows) {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[c] - cell.chars().map(char_width).sum::<usize>());
                let gap = if c == 0 { "" } else { "  " };
                let (before, after) = if right[c] { (pad.as_str(), "") } else { ("", pad.as_str()) };
                line.extend([gap, before, cell, after]);
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn printable(cell: &str) -> String {
    cell.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

fn is_number(cell: &str) -> bool {
    cell.chars().any(|c| c.is_ascii_digit()) && cell.chars().all(|c| c.is_ascii_digit() || ".,-+%".contains(c))
}

/// Columns a character takes on a terminal: East Asian wide forms two, combining marks none.
fn char_width(c: char) -> usize {
    match c as u32 {
        0x0300..=0x036f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff | 0xfe30..=0xfe6f => 2,
        0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f300..=0x1f64f | 0x1f900..=0x1f9ff | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_hold() {
        let mut table = Table::new(["file", "frames", "why"]);
        table.row(["a.png", "1", ""]).row(["猫.mp4", "21", "line\nbreak"]);
        assert_eq!(
            table.render(),
            "file    frames  why\n\
             ------  ------  -----------\n\
             a.png        1\n\
             猫.mp4      21  line\\nbreak\n"
        );
    }
}
