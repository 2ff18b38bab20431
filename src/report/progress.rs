//! Progress of long work: a bar on a terminal, a plain line now and then in a log file, nothing in tests.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Plain lines come at most this often, beside the first and the last.
const PLAIN_EVERY: Duration = Duration::from_secs(15);

/// Counted work that is about to start.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// What it is ("latents", "training").
    pub what: &'a str,
    /// One of what is counted, in the singular ("file", "step").
    pub unit: &'a str,
    /// Done already, when work goes on where it was left.
    pub start: u64,
    pub total: u64,
}

/// The unit of downloads: its pace is a rate, and it has no plural.
pub const MIB: &str = "MiB";

fn plural(unit: &str) -> String {
    match unit {
        MIB => unit.into(),
        _ => format!("{unit}s"),
    }
}

/// Where progress is shown. Handed to everything that takes long; nothing else prints while it works.
pub trait Progress: Send + Sync {
    fn begin(&self, work: Work<'_>) -> Box<dyn Task>;
    /// A line that stays, above any bar.
    fn say(&self, line: &str);
}

/// A piece of work under way. It ends when dropped.
pub trait Task: Send {
    /// `n` more are done; `detail` says what was last done, or the loss.
    fn advance(&mut self, n: u64, detail: &str);
    /// Shows `detail` without counting: what is being worked on now.
    fn detail(&mut self, detail: &str);
}

/// A bar where stderr is a terminal, plain lines on stderr elsewhere.
pub fn for_stderr() -> Arc<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Arc::new(Bars(MultiProgress::new()))
    } else {
        Arc::new(Lines::new(PLAIN_EVERY, Box::new(std::io::stderr())))
    }
}

/// Seconds a unit takes now, and what that means for the rest.
///
/// The pace is taken over the last units only, and never over the first one: what warms up does not count.
#[derive(Debug)]
struct Pace {
    done: u64,
    total: u64,
    began: Instant,
    marks: VecDeque<(Instant, u64)>,
}

/// Units the pace is averaged over.
const PACE_WINDOW: usize = 50;

impl Pace {
    fn new(work: &Work<'_>, now: Instant) -> Self {
        Self { done: work.start, total: work.total, began: now, marks: VecDeque::new() }
    }

    fn advance(&mut self, n: u64, now: Instant) {
        self.done += n;
        self.marks.push_back((now, self.done));
        if self.marks.len() > PACE_WINDOW + 1 {
            self.marks.pop_front();
        }
    }

    fn seconds_per_unit(&self) -> Option<f64> {
        let ((first, from), (last, to)) = (self.marks.front()?, self.marks.back()?);
        (to > from).then(|| (*last - *first).as_secs_f64() / (to - from) as f64)
    }

    /// "1.32 s/step, ETA 3m 07s"; empty while nothing is known.
    fn describe(&self, unit: &str) -> String {
        let seconds = |pace: f64| match unit {
            MIB => format!("{:.1} {MIB}/s", 1.0 / pace.max(1e-9)),
            _ => format!("{}/{unit}", seconds(pace)),
        };
        match self.seconds_per_unit() {
            None => String::new(),
            Some(pace) if self.done >= self.total => seconds(pace),
            Some(pace) => {
                let rest = Duration::from_secs_f64((pace * (self.total - self.done) as f64).min(1e9));
                format!("{}, ETA {}", seconds(pace), clock(rest))
            }
        }
    }
}

/// "0.004 s", "1.32 s", "75.0 s".
fn seconds(s: f64) -> String {
    let decimals = if s < 0.1 {
        3
    } else if s < 10.0 {
        2
    } else {
        1
    };
    format!("{s:.decimals$} s")
}

/// "42s", "3m 07s", "2h 05m".
pub fn clock(time: Duration) -> String {
    let s = time.as_secs_f64().round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m {:02}s", s / 60, s % 60),
        _ => format!("{}h {:02}m", s / 3600, s % 3600 / 60),
    }
}

struct Bars(MultiProgress);

struct Bar {
    bar: ProgressBar,
    pace: Pace,
    unit: String,
}

impl Progress for Bars {
    fn begin(&self, work: Work<'_>) -> Box<dyn Task> {
        let style = ProgressStyle::with_template("{prefix} [{bar:28}] {pos}/{len} {wide_msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        let bar = self.0.add(ProgressBar::new(work.total).with_position(work.start).with_style(style));
        bar.set_prefix(work.what.to_string());
        bar.tick();
        Box::new(Bar { bar, pace: Pace::new(&work, Instant::now()), unit: work.unit.to_string() })
    }

    fn say(&self, line: &str) {
        // Falls back to nothing only when stderr itself is gone.
        let _ = self.0.println(line);
    }
}

impl Bar {
    fn show(&self, detail: &str) {
        let parts = [self.pace.describe(&self.unit), detail.to_string()];
        self.bar.set_message(parts.iter().filter(|p| !p.is_empty()).cloned().collect::<Vec<_>>().join(", "));
    }
}

impl Task for Bar {
    fn advance(&mut self, n: u64, detail: &str) {
        self.pace.advance(n, Instant::now());
        self.bar.set_position(self.pace.done);
        self.show(detail);
    }

    fn detail(&mut self, detail: &str) {
        self.show(detail);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.abandon();
    }
}

type Sink = Arc<Mutex<Box<dyn Write + Send>>>;

/// Plain lines, for logs.
pub struct Lines {
    every: Duration,
    out: Sink,
}

impl Lines {
    /// A line at most every `every`, to `out`.
    pub fn new(every: Duration, out: Box<dyn Write + Send>) -> Self {
        Self { every, out: Arc::new(Mutex::new(out)) }
    }
}

struct LineTask {
    pace: Pace,
    what: String,
    unit: String,
    every: Duration,
    /// When the last line was printed, and the count it showed.
    printed: Option<(Instant, u64)>,
    last_detail: String,
    out: Sink,
}

fn print(out: &Sink, line: &str) {
    let mut out = out.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // A log that cannot be written must not end the work it tells of.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

impl Progress for Lines {
    fn begin(&self, work: Work<'_>) -> Box<dyn Task> {
        Box::new(LineTask {
            pace: Pace::new(&work, Instant::now()),
            what: work.what.to_string(),
            unit: work.unit.to_string(),
            every: self.every,
            printed: None,
            last_detail: String::new(),
            out: self.out.clone(),
        })
    }

    fn say(&self, line: &str) {
        print(&self.out, line);
    }
}

impl LineTask {
    fn print(&mut self, now: Instant) {
        let mut line = format!("{} {}/{} {}", self.what, self.pace.done, self.pace.total, plural(&self.unit));
        for part in [self.pace.describe(&self.unit), self.last_detail.clone()] {
            if !part.is_empty() {
                line.push_str(", ");
                line.push_str(&part);
            }
        }
        print(&self.out, &line);
        self.printed = Some((now, self.pace.done));
    }
}

impl Task for LineTask {
    fn advance(&mut self, n: u64, detail: &str) {
        let now = Instant::now();
        self.pace.advance(n, now);
        self.last_detail = detail.to_string();
        if self.printed.is_none_or(|(at, _)| now - at >= self.every) || self.pace.done == self.pace.total {
            self.print(now);
        }
    }

    fn detail(&mut self, _detail: &str) {}
}

impl Drop for LineTask {
    /// Says how long it took, and where it stopped if it was not the end.
    fn drop(&mut self) {
        if self.printed.is_some_and(|(_, shown)| shown != self.pace.done) {
            self.print(Instant::now());
        }
        if self.printed.is_some() {
            let took = clock(self.pace.began.elapsed());
            print(&self.out, &format!("{}: {} {} in {took}", self.what, self.pace.done, plural(&self.unit)));
        }
    }
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _work: Work<'_>) -> Box<dyn Task> {
        Box::new(Silent)
    }

    fn say(&self, _line: &str) {}
}

impl Task for Silent {
    fn advance(&mut self, _n: u64, _detail: &str) {}

    fn detail(&mut self, _detail: &str) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_leaves_out_the_first_unit_and_what_was_done_before() {
        let t0 = Instant::now();
        let at = |s: f64| t0 + Duration::from_secs_f64(s);
        let mut pace = Pace::new(&Work { what: "training", unit: "step", start: 100, total: 110 }, t0);
        pace.advance(1, at(60.0));
        assert_eq!(pace.describe("step"), "");
        pace.advance(1, at(62.0));
        pace.advance(1, at(64.0));
        assert_eq!(pace.seconds_per_unit(), Some(2.0));
        assert_eq!(pace.describe("step"), "2.00 s/step, ETA 14s");
        for i in 0..PACE_WINDOW * 2 {
            pace.advance(0, at(64.0 + i as f64));
        }
        assert_eq!(pace.seconds_per_unit(), None);
    }

    #[test]
    fn times_read_well() {
        assert_eq!(clock(Duration::from_secs(59)), "59s");
        assert_eq!(clock(Duration::from_secs(187)), "3m 07s");
        assert_eq!(clock(Duration::from_secs(7500)), "2h 05m");
        assert_eq!(
            (seconds(0.0123), seconds(1.318), seconds(75.0)),
            ("0.012 s".into(), "1.32 s".into(), "75.0 s".into())
        );
    }

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_gets_the_first_and_the_last_line_and_few_between() {
        let log = Log::default();
        let lines = Lines::new(Duration::from_secs(3600), Box::new(log.clone()));
        let mut task = lines.begin(Work { what: "latents", unit: "file", start: 0, total: 3 });
        for name in ["a.png", "b.png", "c.png"] {
            task.advance(1, name);
        }
        drop(task);
        lines.say("done");
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let shown: Vec<&str> = text.lines().collect();
        assert_eq!(shown.len(), 4, "{text}");
        assert_eq!(shown[0], "latents 1/3 files, a.png");
        assert!(shown[1].starts_with("latents 3/3 files, 0.") && shown[1].ends_with("c.png"), "{text}");
        assert_eq!(&shown[2..], ["latents: 3 files in 0s", "done"]);
    }
}
