//! The HTML report of a run, drawn by a real browser: Chromium or Chrome without a window, if one is on the PATH.
//! `WAN_TRAIN_BROWSER=required` makes its absence a failure.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{text, Bench};

const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
/// Wider than the page, and high enough to show all of it.
const WINDOW: (u32, u32) = (1100, 2600);
/// Width of the page's text, and of a chart in its own units (see `src/report/html.rs`).
const PAGE: f64 = 980.0;
const CHART: (f64, f64) = (900.0, 260.0);
const MAIN: [u8; 3] = [0x14, 0x50, 0x9f];
const RAW: [u8; 3] = [0x9c, 0xc3, 0xe8];

fn browser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    BROWSERS.iter().flat_map(|name| dirs.iter().map(move |dir| dir.join(name))).find(|file| file.is_file())
}

/// A proxy that answers nobody and writes down who asked for what.
struct Proxy {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let list = asked.clone();
        // Ends with the process: it waits for connections all its life.
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
                let mut buffer = [0u8; 1024];
                let n = stream.read(&mut buffer).unwrap_or(0);
                let line = String::from_utf8_lossy(&buffer[..n]).lines().next().unwrap_or_default().to_owned();
                list.lock().unwrap().push(line);
                let _ = stream.write_all(b"HTTP/1.1 503 none\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// Whether the browser asks this on its own account (time, updates, accounts). What pages are made of, fonts and scripts,
/// comes from other hosts of its maker.
fn of_the_browser(line: &str) -> bool {
    let host = line.split(' ').nth(1).unwrap_or_default().trim_start_matches("http://").split(['/', ':']).next();
    let (name, maker) = host.unwrap_or_default().split_once('.').unwrap_or_default();
    ["google.com", "googleapis.com", "gvt1.com", "me.gvt1.com"].contains(&maker) && !["fonts", "ajax"].contains(&name)
}

/// A page as the browser draws it, and every request that was made meanwhile.
fn drawn(browser: &Path, page: &Path, dir: &Path) -> (image::RgbImage, Vec<String>) {
    let (picture, proxy) = (dir.join("page.png"), Proxy::new());
    let _ = std::fs::remove_file(&picture);
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"])
        .args(["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--disable-default-apps", "--disable-extensions", "--force-device-scale-factor=1"])
        .args(["--disable-features=OptimizationHints,MediaRouter,Translate"])
        .arg(format!("--proxy-server=http://{}", proxy.address))
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("--window-size={},{}", WINDOW.0, WINDOW.1))
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let clock = Instant::now();
    while child.try_wait().unwrap().is_none() && clock.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    let said = std::fs::read_to_string(dir.join("stderr")).unwrap_or_default();
    let picture = image::open(&picture).unwrap_or_else(|e| panic!("{} drew nothing ({e}):\n{said}", browser.display()));
    (picture.to_rgb8(), proxy.asked())
}

/// Whether a pixel within two of (x, y) has the colour, give or take what smoothing of edges makes of it.
fn near(picture: &image::RgbImage, x: f64, y: f64, colour: [u8; 3]) -> bool {
    let (x, y) = (x.round() as i64, y.round() as i64);
    let is = |p: &image::Rgb<u8>| p.0.iter().zip(colour).all(|(a, b)| a.abs_diff(b) <= 24);
    let at = |dx: i64, dy: i64| picture.get_pixel_checked(u32::try_from(x + dx).ok()?, u32::try_from(y + dy).ok()?);
    (-2..=2).any(|dy| (-2..=2).any(|dx| at(dx, dy).is_some_and(is)))
}

/// Points of every line of a class, in the order of the page.
fn lines(html: &str, class: &str) -> Vec<Vec<(f64, f64)>> {
    let start = format!("<polyline class=\"{class}\" points=\"");
    let points = |rest: &str| -> Vec<(f64, f64)> {
        let pairs = rest.split('"').next().unwrap().split_whitespace();
        pairs.map(|p| p.split_once(',').unwrap()).map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect()
    };
    html.split(&start).skip(1).map(points).collect()
}

#[test]
fn a_browser_draws_the_report_of_a_run() {
    let Some(browser) = browser() else {
        let line = format!("a_browser_draws_the_report_of_a_run was NOT run: none of {BROWSERS:?} is on the PATH\n");
        assert!(std::env::var("WAN_TRAIN_BROWSER").as_deref() != Ok("required"), "{line}");
        // Past the harness, which shows what a passing test prints to nobody.
        std::io::stdout().write_all(line.as_bytes()).unwrap();
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    // The check for requests can fail: a page that wants something from elsewhere is found out.
    let curious = dir.path().join("curious.html");
    std::fs::write(&curious, "<!doctype html><body><img src=\"http://elsewhere.invalid/picture.png\">").unwrap();
    let (blank, asked) = drawn(&browser, &curious, dir.path());
    let found = asked.iter().any(|line| line.contains("elsewhere.invalid") && !of_the_browser(line));
    assert!(found && !of_the_browser("CONNECT fonts.googleapis.com:443 HTTP/1.1"), "{asked:?}");
    assert!(!blank.pixels().any(|p| p.0 == MAIN));

    let bench = Bench::new();
    let out = bench.run("", &["--epochs", "2"]);
    assert!(out.status.success(), "{}", text(&out));
    let report = bench.outputs(".html").pop().unwrap();
    let html = std::fs::read_to_string(&report).unwrap();
    let (picture, asked) = drawn(&browser, &report.canonicalize().unwrap(), dir.path());
    if let Ok(keep) = std::env::var("WAN_TRAIN_KEEP_PICTURES") {
        picture.save(Path::new(&keep).join("browser.png")).unwrap();
    }
    let outside: Vec<&String> = asked.iter().filter(|line| !of_the_browser(line)).collect();
    assert!(outside.is_empty(), "the report asks for something from elsewhere: {outside:?}");
    assert_eq!(picture.dimensions(), WINDOW);
    let dark = picture.pixels().filter(|p| p.0.iter().all(|c| *c < 128)).count();
    assert!(dark > 5_000, "text: {dark} dark pixels");

    // Charts have the width of the page; how far down they begin depends on the fonts, so that is looked for: the first
    // place from which on every point of the line is drawn in its colour.
    let (left, scale) = ((f64::from(WINDOW.0) - PAGE) / 2.0, PAGE / CHART.0);
    let place = |line: &[(f64, f64)], colour: [u8; 3], from: usize| -> Option<usize> {
        let drawn_at = |top: &usize| {
            let at = |p: &&(f64, f64)| near(&picture, left + scale * p.0, *top as f64 + scale * p.1, colour);
            line.iter().filter(at).count() * 100 >= 98 * line.len()
        };
        (from..WINDOW.1 as usize - (scale * CHART.1) as usize).find(drawn_at)
    };
    // Loss, learning rate, gradient norm, one below the other.
    let (main, raw) = (lines(&html, "main"), lines(&html, "raw"));
    assert_eq!((main.len(), raw.len()), (3, 2));
    assert!(main.iter().all(|line| line.len() >= 4), "{main:?}");
    let mut below = 0;
    for (number, line) in main.iter().enumerate() {
        let top = place(line, MAIN, below).unwrap_or_else(|| panic!("the line of chart {number} is not there"));
        let (first, last) = (line[0].0, line[line.len() - 1].0);
        assert!(last - first > 0.8 * CHART.0, "chart {number} goes from side to side");
        if let Some(raw) = [Some(&raw[0]), None, Some(&raw[1])][number] {
            // Where the smoothed line lies over it, it is hidden.
            let seen = |p: &&(f64, f64)| {
                let (x, y) = (left + scale * p.0, top as f64 + scale * p.1);
                near(&picture, x, y, RAW) || near(&picture, x, y, MAIN)
            };
            let (seen, all) = (raw.iter().filter(seen).count(), raw.len());
            assert!(seen * 10 >= 9 * all, "chart {number}: {seen} of {all} measured points are drawn");
        }
        below = top + (0.9 * scale * CHART.1) as usize;
    }
}
