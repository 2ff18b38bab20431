//! The report beside a checkpoint: one HTML file that needs no server, no network and no script, readable years later.
//! What users wrote (names, captions, paths) is escaped everywhere.

use std::fmt::Write;
use std::path::Path;

use html_escape::encode_safe;

use super::curve::{smoothed, ticks};
use super::runlog::Point;
use crate::fsio;

/// Everything a report shows.
#[derive(Debug, Clone, Default)]
pub struct RunReport {
    pub title: String,
    /// Name and value, in the order they are shown.
    pub facts: Vec<(String, String)>,
    /// Every logged step.
    pub points: Vec<Point>,
    /// What became of every file, as a table of text.
    pub dataset: String,
    /// The memory plan as text, and what was measured beside it.
    pub plan: String,
    pub measured: Vec<String>,
    /// Name, value, origin of every option.
    pub options: Vec<[String; 3]>,
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5c6b7a;--line:#d9e0e7;--paper:#fff;--raw:#9cc3e8;--main:#14509f}\
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa8b6;--line:#35414d;--paper:#151b21;--raw:#3b6590;--main:#7ab8ff}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:980px;margin:2em auto;padding:0 1em}\
h1{font-size:1.5em}h2{font-size:1.15em;margin:2em 0 .4em}svg{width:100%;height:auto}\
svg text{fill:var(--soft);font-size:12px}svg .grid{stroke:var(--line)}svg .raw{stroke:var(--raw);fill:none}\
svg .main{stroke:var(--main);fill:none;stroke-width:2}svg .bar{fill:var(--raw)}svg .bad{stroke:#d62828}\
table{border-collapse:collapse}td,th{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}\
td{border-top:1px solid var(--line);overflow-wrap:anywhere}.soft{color:var(--soft)}\
pre{overflow-x:auto;font-size:13px;line-height:1.35;border:1px solid var(--line);padding:.8em}";

/// Writes the report atomically.
pub fn write_report(path: &Path, report: &RunReport) -> anyhow::Result<()> {
    fsio::write_bytes(path, render(report).as_bytes())
}

/// The whole page.
pub fn render(r: &RunReport) -> String {
    let mut page = String::with_capacity(64 << 10);
    let title = encode_safe(&r.title);
    let _ = writeln!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    );
    table(&mut page, r.facts.iter().map(|(k, v)| [k.as_str(), v.as_str()]));
    let of = |get: fn(&Point) -> f64| -> Vec<(u64, f64)> { r.points.iter().map(|p| (p.step, get(p))).collect() };
    section(&mut page, "Loss", &chart(&of(|p| p.loss), true));
    let of_expert = |which: usize| -> Vec<(u64, f64)> {
        r.points.iter().filter_map(|p| Some((p.step, p.experts[which]?))).collect()
    };
    if let (high @ [_, ..], low @ [_, ..]) = (&of_expert(0)[..], &of_expert(1)[..]) {
        section(&mut page, "Loss, high noise", &chart(high, true));
        section(&mut page, "Loss, low noise", &chart(low, true));
    }
    section(&mut page, "Learning rate", &chart(&of(|p| p.lr), false));
    section(&mut page, "Gradient norm, before clipping", &chart(&of(|p| p.grad_norm), true));
    section(&mut page, "Timesteps trained on", &histogram(&r.points));
    section(&mut page, "Dataset", &text(&r.dataset));
    let measured = r.measured.join("\n");
    section(&mut page, "Memory: planned and measured", &text(&format!("{}\n{measured}", r.plan.trim_end())));
    let mut options = String::from("<details open><summary>Options that were set</summary>\n");
    let set = |o: &&[String; 3]| o[2] != "default";
    table(&mut options, r.options.iter().filter(set).map(|o| [o[0].as_str(), o[1].as_str(), o[2].as_str()]));
    options.push_str("</details>\n<details><summary>Defaults</summary>\n");
    table(&mut options, r.options.iter().filter(|o| !set(o)).map(|o| [o[0].as_str(), o[1].as_str()]));
    options.push_str("</details>\n");
    section(&mut page, "Configuration", &options);
    page.push_str("</body>\n</html>\n");
    page
}

fn section(page: &mut String, title: &str, body: &str) {
    let _ = writeln!(page, "<section>\n<h2>{}</h2>\n{body}</section>", encode_safe(title));
}

fn text(body: &str) -> String {
    format!("<pre>{}</pre>\n", encode_safe(body.trim_end()))
}

fn table<'a, const N: usize>(page: &mut String, rows: impl Iterator<Item = [&'a str; N]>) {
    page.push_str("<table>\n");
    for row in rows {
        page.push_str("<tr>");
        for (i, cell) in row.iter().enumerate() {
            let class = if i == 0 || i == 2 { " class=\"soft\"" } else { "" };
            let _ = write!(page, "<td{class}>{}</td>", encode_safe(cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
/// Room for half of the last label.
const RIGHT: f64 = WIDTH - 24.0;
const BOTTOM: f64 = HEIGHT - 34.0;
const TOP: f64 = 12.0;
/// Points a line is drawn with at most: what is left out would lie within one dot.
const DOTS: usize = 900;

/// A line over steps; `noisy` ones get a smoothed line besides. Values that are not finite get a mark on the axis.
fn chart(points: &[(u64, f64)], noisy: bool) -> String {
    let finite: Vec<(u64, f64)> = points.iter().copied().filter(|p| p.1.is_finite()).collect();
    if finite.is_empty() {
        return "<p class=\"soft\">nothing was logged</p>\n".into();
    }
    let smooth = if noisy { smoothed(&finite) } else { finite.clone() };
    let mut sorted: Vec<f64> = finite.iter().map(|p| p.1).collect();
    sorted.sort_by(f64::total_cmp);
    // A spike must not flatten the rest.
    let high = smooth.iter().map(|p| p.1).fold(sorted[(sorted.len() - 1) - sorted.len() / 200], f64::max);
    let (low, high) =
        if high > sorted[0] { (sorted[0], high) } else { (sorted[0] - 1e-12, high + high.abs().max(1e-9)) };
    let low = if low >= 0.0 && low < 0.5 * high { 0.0 } else { low };
    let (first, last) = (points[0].0 as f64, (points[points.len() - 1].0 as f64).max(points[0].0 as f64 + 1.0));
    let x = |step: u64| LEFT + (RIGHT - LEFT) * (step as f64 - first) / (last - first);
    let y = |v: f64| BOTTOM - (BOTTOM - TOP) * ((v - low) / (high - low)).clamp(0.0, 1.0);
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n");
    for value in ticks((low, high), 5.0, f64::MIN_POSITIVE).0 {
        let (at, label) = (y(value), short(value));
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    for step in ticks((first, last), 8.0, 1.0).0 {
        let at = x(step as u64);
        let _ = writeln!(svg, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{step}</text>", HEIGHT - 12.0);
    }
    let mut line = |series: &[(u64, f64)], class: &str| {
        let _ = write!(svg, "<polyline class=\"{class}\" points=\"");
        for (step, value) in thinned(series) {
            let _ = write!(svg, "{:.1},{:.1} ", x(step), y(value));
        }
        svg.push_str("\"/>\n");
    };
    if noisy {
        line(&finite, "raw");
    }
    line(&smooth, "main");
    for (step, _) in points.iter().filter(|p| !p.1.is_finite()) {
        let at = x(*step);
        let _ = writeln!(
            svg,
            "<line class=\"bad\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{BOTTOM}\"/>",
            BOTTOM - 12.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// The lowest and the highest of each stretch, where there are more points than dots.
fn thinned(series: &[(u64, f64)]) -> Vec<(u64, f64)> {
    if series.len() <= DOTS {
        return series.to_vec();
    }
    let mut kept = Vec::with_capacity(DOTS + 2);
    for stretch in series.chunks(series.len().div_ceil(DOTS / 2)) {
        let mut ends: Vec<(u64, f64)> = [
            stretch.iter().min_by(|a, b| a.1.total_cmp(&b.1)).copied(),
            stretch.iter().max_by(|a, b| a.1.total_cmp(&b.1)).copied(),
        ]
        .into_iter()
        .flatten()
        .collect();
        ends.sort_by_key(|p| p.0);
        ends.dedup();
        kept.extend(ends);
    }
    kept
}

/// 0.0001 as "1e-4", 0.25 as "0.25".
fn short(value: f64) -> String {
    if value != 0.0 && !(1e-3..1e5).contains(&value.abs()) {
        return format!("{value:.2e}").replace(".00e", "e").replace("0e", "e");
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

const BINS: usize = 20;

/// How often each noise level was drawn, with the mean loss there.
fn histogram(points: &[Point]) -> String {
    let mut bins = [(0u64, 0.0f64, 0u64); BINS];
    for (t, loss) in points.iter().flat_map(|p| &p.samples).filter(|s| s.0.is_finite()) {
        let bin = &mut bins[((t / 1000.0 * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += 1;
        if loss.is_finite() {
            bin.1 += loss;
            bin.2 += 1;
        }
    }
    let most = bins.iter().map(|b| b.0).max().unwrap_or(0);
    if most == 0 {
        return "<p class=\"soft\">nothing was logged</p>\n".into();
    }
    let total: u64 = bins.iter().map(|b| b.0).sum();
    let wide = (RIGHT - LEFT) / BINS as f64;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n");
    for (i, (count, loss, losses)) in bins.iter().enumerate() {
        let high = (BOTTOM - TOP - 16.0) * *count as f64 / most as f64;
        let (x, from, to) = (LEFT + wide * i as f64, 1000 * i / BINS, 1000 * (i + 1) / BINS);
        let mean = if *losses > 0 { format!("{:.4}", loss / *losses as f64) } else { "none".into() };
        let share = 100.0 * *count as f64 / total as f64;
        let _ = write!(
            svg,
            "<g><title>t {from} to {to}: {count} samples ({share:.1} %), mean loss {mean}</title>\
             <rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{high:.1}\"/>",
            x + 1.0,
            BOTTOM - high,
            wide - 2.0
        );
        if *losses > 0 {
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" style=\"font-size:9px\">{mean}</text>",
                x + wide / 2.0,
                BOTTOM - high - 4.0
            );
        }
        svg.push_str("</g>\n");
    }
    for mark in (0..=1000).step_by(100) {
        let x = LEFT + (RIGHT - LEFT) * f64::from(mark) / 1000.0;
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{mark}</text>", HEIGHT - 12.0);
    }
    let _ =
        writeln!(svg, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{BOTTOM}\" y2=\"{BOTTOM}\"/>\n</svg>");
    svg.push_str("<p class=\"soft\">Numbers over the bars: mean loss of these samples.</p>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short() {
        for (v, want) in [(0.0, "0"), (0.25, "0.25"), (1e-4, "1e-4"), (8e-5, "8e-5"), (2.5e-5, "2.5e-5"), (12.0, "12")]
        {
            assert_eq!(short(v), want);
        }
    }

    #[test]
    fn thinning_keeps_every_spike() {
        let mut series: Vec<(u64, f64)> = (0..50_000).map(|i| (i, 0.1)).collect();
        series[33_333].1 = 9.0;
        let kept = thinned(&series);
        assert!(kept.len() <= DOTS + 2 && kept.contains(&(33_333, 9.0)), "{}", kept.len());
        assert!(kept.windows(2).all(|w| w[0].0 < w[1].0));
    }
}
