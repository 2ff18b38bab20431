//! What a run writes about itself, read back by other means than it was written with.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use wan_train::report::tensorboard::masked_crc32c;
use wan_train::report::{event_dir, write_loss_curve, write_report, Point, RunLog, RunReport, StepLog};

/// One protobuf field: number, and its value as a varint, fixed bytes or a length-delimited body.
#[derive(Debug, Clone)]
enum Field<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
}

/// Takes a protobuf message apart; panics on anything malformed, as a test may.
fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
    fn varint(data: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = data[0];
            *data = &data[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }
    let mut found = Vec::new();
    while !data.is_empty() {
        let key = varint(&mut data);
        let length = match key & 7 {
            0 => {
                found.push((key >> 3, Field::Varint(varint(&mut data))));
                continue;
            }
            1 => 8,
            5 => 4,
            2 => varint(&mut data) as usize,
            other => panic!("wire type {other}"),
        };
        let (body, rest) = data.split_at(length);
        found.push((key >> 3, Field::Bytes(body)));
        data = rest;
    }
    found
}

/// The payloads of a TFRecord file, after checking both checksums of each record.
fn records(file: &[u8]) -> Vec<&[u8]> {
    let mut at = 0;
    let mut found = Vec::new();
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    while at < file.len() {
        let length = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(u32_at(at + 8), masked_crc32c(&file[at..at + 8]), "checksum of a length");
        let body = &file[at + 12..at + 12 + length];
        assert_eq!(u32_at(at + 12 + length), masked_crc32c(body), "checksum of a record");
        found.push(body);
        at += 16 + length;
    }
    found
}

#[derive(Debug, Default, PartialEq)]
struct Event {
    step: u64,
    version: Option<String>,
    scalars: BTreeMap<String, f32>,
    texts: BTreeMap<String, String>,
    session_start: bool,
}

fn event(body: &[u8]) -> Event {
    let mut event = Event::default();
    let mut wall_time = None;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    for field in fields(body) {
        match field {
            (1, Field::Bytes(time)) => wall_time = Some(f64::from_le_bytes(time.try_into().unwrap())),
            (2, Field::Varint(step)) => event.step = step,
            (3, Field::Bytes(version)) => event.version = Some(text(version)),
            (7, Field::Bytes(log)) => event.session_start = matches!(fields(log)[..], [(1, Field::Varint(1))]),
            (5, Field::Bytes(summary)) => {
                for (_, value) in fields(summary) {
                    let Field::Bytes(value) = value else { panic!("{value:?}") };
                    let mut tag = String::new();
                    for part in fields(value) {
                        match part {
                            (1, Field::Bytes(name)) => tag = text(name),
                            (2, Field::Bytes(v)) => {
                                event.scalars.insert(tag.clone(), f32::from_le_bytes(v.try_into().unwrap()));
                            }
                            (8, Field::Bytes(tensor)) => {
                                let body = fields(tensor).into_iter().find_map(|(n, f)| match f {
                                    Field::Bytes(b) if n == 8 => Some(text(b)),
                                    _ => None,
                                });
                                event.texts.insert(tag.clone(), body.unwrap());
                            }
                            (9, Field::Bytes(_)) => {}
                            other => panic!("{other:?}"),
                        }
                    }
                }
            }
            other => panic!("{other:?}"),
        }
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - wall_time.expect("every event has a time")).abs() < 600.0);
    event
}

fn events_in(dir: &Path) -> Vec<Event> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut events = Vec::new();
    for file in files {
        assert!(file.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
        let bytes = fs::read(file).unwrap();
        events.extend(records(&bytes).into_iter().map(event));
    }
    events
}

fn log_steps(log: &mut RunLog, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        let loss = 1.0 / step as f64;
        let lr = [("unet", 1e-4), ("unet plus", 4e-4)];
        let extra = [("grad_norm", 0.5), ("loss/low", loss)];
        log.step(&StepLog {
            step,
            epoch: 1,
            loss,
            average: loss / 2.0,
            lr: &lr,
            extra: &extra,
            samples: &[(875.25, loss)],
        })
        .unwrap();
    }
}

#[test]
fn tensorboard_files_carry_the_old_tags_and_right_checksums() {
    let dir = tempfile::tempdir().unwrap();
    let started = chrono::Local::now();
    let events = event_dir(dir.path(), "run-", started, None).unwrap();
    let stamp = started.format("%Y%m%d%H%M%S");
    assert_eq!(events, dir.path().join(format!("run-{stamp}")).join("network_train"));
    let another = event_dir(dir.path(), "run-", started, Some("mine")).unwrap();
    assert_eq!(another, dir.path().join(format!("run-{stamp}-2")).join("mine"));

    let mut log = RunLog::create(&events, &dir.path().join("steps.jsonl"), None).unwrap();
    log.config("dim = 8").unwrap();
    log_steps(&mut log, 1..=3);
    log.epoch(1, 0.625).unwrap();
    drop(log);

    let found = events_in(&events);
    assert_eq!(found[0].version.as_deref(), Some("brain.Event:2"));
    assert_eq!(found[1].texts["config"], "```\ndim = 8\n```");
    let second = &found[3];
    assert_eq!(second.step, 2);
    let expected: BTreeMap<String, f32> = [
        ("loss/current", 0.5),
        ("loss/average", 0.25),
        ("lr/unet", 1e-4),
        ("lr/unet plus", 4e-4),
        ("grad_norm", 0.5),
        ("loss/low", 0.5),
    ]
    .into_iter()
    .map(|(tag, v)| (tag.to_string(), v))
    .collect();
    assert_eq!(second.scalars, expected);
    assert_eq!(found[5].scalars, BTreeMap::from([("loss/epoch".to_string(), 0.625)]));
    assert_eq!(found.len(), 6);
}

#[test]
fn a_flipped_bit_in_an_event_file_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = RunLog::create(dir.path(), &dir.path().join("lines/steps.jsonl"), None).unwrap();
    log_steps(&mut log, 1..=1);
    drop(log);
    let file = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).find(|p| p.is_file()).unwrap();
    let mut bytes = fs::read(file).unwrap();
    let n = bytes.len();
    bytes[n - 6] ^= 1;
    assert!(std::panic::catch_unwind(|| records(&bytes).len()).is_err());
}

#[test]
fn a_resumed_log_goes_on_where_the_checkpoint_was() {
    let dir = tempfile::tempdir().unwrap();
    let (events, lines) = (dir.path().join("logs"), dir.path().join("steps.jsonl"));
    let mut log = RunLog::create(&events, &lines, None).unwrap();
    log_steps(&mut log, 1..=5);
    drop(log);
    // The process died inside a line.
    let mut text = fs::read_to_string(&lines).unwrap();
    text.push_str("{\"step\":6,\"loss/cur");
    fs::write(&lines, &text).unwrap();

    let mut log = RunLog::create(&events, &lines, Some(3)).unwrap();
    log_steps(&mut log, 4..=6);
    log.write_curve(&dir.path().join("loss.png")).unwrap();
    drop(log);

    let steps: Vec<u64> = fs::read_to_string(&lines)
        .unwrap()
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let points = wan_train::report::runlog::read_points(&lines).unwrap();
    let want = Point {
        step: 2,
        loss: 0.5,
        experts: [None, Some(0.5)],
        lr: 1e-4,
        grad_norm: 0.5,
        samples: vec![(875.25, 0.5)],
    };
    assert_eq!(points[1], want);
    let restart: Vec<u64> = events_in(&events).iter().filter(|e| e.session_start).map(|e| e.step).collect();
    assert_eq!(restart, [4]);
    assert!(image::open(dir.path().join("loss.png")).is_ok());
}

#[test]
fn losses_that_are_not_numbers_are_logged_as_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let lines = dir.path().join("steps.jsonl");
    let mut log = RunLog::create(&dir.path().join("logs"), &lines, None).unwrap();
    let lr = [("unet", 1e-4)];
    for (step, loss) in [(1, 0.5), (2, f64::NAN), (3, f64::INFINITY)] {
        log.step(&StepLog { step, epoch: 1, loss, average: 0.5, lr: &lr, extra: &[], samples: &[] }).unwrap();
    }
    let losses = wan_train::report::runlog::read_losses(&lines).unwrap();
    assert_eq!(losses[0], (1, 0.5));
    assert!(losses[1].1.is_nan() && losses[2].1 == f64::INFINITY);
}

/// A curve that falls and jitters, as losses do, without a random number.
fn falling(n: u64) -> Vec<(u64, f64)> {
    (1..=n)
        .map(|i| {
            let jitter = (i.wrapping_mul(2_654_435_761) % 1000) as f64 / 1000.0 - 0.5;
            (i, 0.08 + 0.12 * (-(i as f64) / 150.0).exp() + 0.05 * jitter)
        })
        .collect()
}

#[test]
fn the_loss_curve_is_a_picture_of_the_curve() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/loss.png");
    let mut points = falling(600);
    points[400].1 = f64::NAN;
    write_loss_curve(&path, &points).unwrap();
    if let Ok(keep) = std::env::var("WAN_TRAIN_KEEP_PICTURES") {
        fs::copy(&path, Path::new(&keep).join("loss.png")).unwrap();
    }
    let picture = image::open(&path).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (960, 540));
    // The smoothed line is dark blue; where it is in a column falls from left to right (y grows downwards).
    let height_of = |x: u32| {
        let blue = |y: &u32| {
            let p = picture.get_pixel(x, *y).0;
            p[2] > p[0].saturating_add(80) && p[0] < 90
        };
        let rows: Vec<u32> = (50..476).filter(blue).collect();
        rows.iter().sum::<u32>() as f64 / rows.len() as f64
    };
    let (left, middle, right) = (height_of(120), height_of(300), height_of(900));
    assert!(left < middle && middle < right, "{left} {middle} {right}");
    let red = picture.pixels().filter(|p| p[0] > 180 && p[1] < 90 && p[2] < 90).count();
    assert!(red > 5, "the loss that is not a number leaves a mark");
    for strange in [vec![], vec![(1, 0.5)], vec![(1, f64::NAN)], vec![(1, 0.0), (2, 0.0)], vec![(5, -1.0), (9, 1e30)]] {
        write_loss_curve(&path, &strange).unwrap();
        assert!(image::open(&path).is_ok());
    }
}

/// Every tag closes in order, nothing is loaded from elsewhere, and no script runs.
fn assert_page(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let void = ["meta", "line", "polyline", "rect", "!doctype"];
    for tag in html.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap_or_else(|| panic!("an open <{tag}"));
        let name = tag.split([' ', '/']).find(|n| !n.is_empty()).unwrap();
        match tag.strip_prefix('/') {
            Some(_) => assert_eq!(open.pop(), Some(name), "</{name}> closes another tag"),
            None if void.contains(&name) => {}
            None => open.push(name),
        }
    }
    assert!(open.is_empty(), "{open:?} stay open");
    for outside in ["http:", "https:", "src=", "href=", "<script", "javascript:", "url(", "@import"] {
        assert!(!html.contains(outside), "{outside}");
    }
}

#[test]
fn a_report_is_a_page_that_stands_alone() {
    let points: Vec<Point> = falling(2000)
        .into_iter()
        .map(|(step, loss)| {
            let t = (step * 37 % 1000) as f64;
            Point { step, loss, lr: 1e-4 / step as f64, grad_norm: 0.5, samples: vec![(t, loss)], ..Point::default() }
        })
        .collect();
    let mut report = RunReport {
        title: "cat</title><script>alert(1)</script> & \"dog\"".into(),
        facts: vec![("seed".into(), "42".into()), ("base".into(), "<b>x</b>".into())],
        points,
        dataset: "a<img src=x onerror=alert(1)>.png  used\n".into(),
        plan: "adapters  0.5 GiB".into(),
        measured: vec!["peak device memory: 1.00 GiB".into()],
        options: vec![
            ["learning_rate".into(), "0.0001".into(), "flag".into()],
            ["network_dim".into(), "4".into(), "default".into()],
        ],
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/run.html");
    write_report(&path, &report).unwrap();
    if let Ok(keep) = std::env::var("WAN_TRAIN_KEEP_PICTURES") {
        fs::copy(&path, Path::new(&keep).join("report.html")).unwrap();
    }
    let html = fs::read_to_string(&path).unwrap();
    assert_page(&html.replace("&lt;img src=x", "").replace("onerror", ""));
    assert!(
        html.contains("cat&lt;&#x2F;title&gt;&lt;script&gt;") && !html.contains("<script") && !html.contains("<img")
    );
    for word in ["Learning rate", "Timesteps trained on", "peak device memory: 1.00 GiB", "adapters  0.5 GiB", "0.0001"]
    {
        assert!(html.contains(word), "{word}");
    }
    assert_eq!(html.matches("<polyline").count(), 5, "loss and gradient norm twice, learning rate once");
    assert_eq!(html.matches("<rect").count(), 20, "bins");
    assert!(html.contains("t 500 to 550: 100 samples (5.0 %)"), "each timestep twice");
    // Every point lies within its picture.
    for line in html.split("points=\"").skip(1) {
        for point in line.split('"').next().unwrap().split_whitespace() {
            let (x, y) = point.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((0.0..=900.0).contains(&x) && (0.0..=260.0).contains(&y), "{point}");
        }
    }
    assert!(html.len() < 200_000, "{} bytes", html.len());
    // Two experts under one adapter: a curve for each.
    for (i, point) in report.points.iter_mut().enumerate() {
        point.experts[usize::from(i % 3 > 0)] = Some(point.loss);
    }
    write_report(&path, &report).unwrap();
    let both = fs::read_to_string(&path).unwrap();
    assert!(both.contains("Loss, high noise") && both.contains("Loss, low noise") && !html.contains("Loss, high"));
    assert_eq!(both.matches("<polyline").count(), 9);
    // Runs that went wrong, or have not begun.
    report.points = vec![Point { step: 1, loss: f64::NAN, ..Point::default() }];
    report.points.push(Point {
        step: 2,
        loss: 0.5,
        lr: f64::NAN,
        grad_norm: f64::INFINITY,
        samples: vec![(f64::NAN, 1.0)],
        ..Point::default()
    });
    write_report(&path, &report).unwrap();
    let html = fs::read_to_string(&path).unwrap();
    assert!(html.contains("class=\"bad\"") && html.contains("nothing was logged"));
    report.points.clear();
    write_report(&path, &report).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("sub")).unwrap().count(), 1, "no temporary file stays");
}
