//! Signals that ask a run to end: Ctrl-C, a termination signal, a terminal that goes away. Each asks for an orderly end, with a
//! checkpoint. Only a second Ctrl-C ends at once: shells and service managers send the other two more than once for one
//! occasion. Where hangups are ignored from the start (`nohup`), they stay ignored.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};

/// What Ctrl-C twice ends with.
#[cfg(unix)]
const INTERRUPTED: i32 = 130;

/// From here on a signal sets `stop`. Only the first call of a process does anything.
pub fn catch(stop: &Arc<AtomicBool>) {
    static CAUGHT: Once = Once::new();
    CAUGHT.call_once(|| listen(stop.clone()));
}

#[cfg(unix)]
fn listen(stop: Arc<AtomicBool>) {
    use std::io::Write;
    use std::sync::atomic::Ordering;

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

    let wanted = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| *signal != SIGHUP || !ignored(SIGHUP));
    // Without a listener the system's own ways stay: a signal ends the process, and the last checkpoint counts.
    let Ok(mut signals) = signal_hook::iterator::Signals::new(wanted) else { return };
    let listener = move || {
        for signal in signals.forever() {
            let again = stop.swap(true, Ordering::Relaxed);
            if again && signal == SIGINT {
                std::process::exit(INTERRUPTED);
            }
            if !again {
                let what = match signal {
                    SIGHUP => "the terminal is gone (nohup or tmux keep a run alive): ",
                    _ => "",
                };
                // Nobody may be left to read it.
                let mut err = std::io::stderr();
                let _ = writeln!(err, "\n{what}stopping at the next safe point; press Ctrl-C again to stop at once");
            }
        }
    };
    let _ = std::thread::Builder::new().name("signals".into()).spawn(listener);
}

#[cfg(not(unix))]
fn listen(_stop: Arc<AtomicBool>) {}

/// Whether this process was started with `signal` ignored. Known on Linux; elsewhere taken for not ignored.
#[cfg(unix)]
fn ignored(signal: i32) -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| is_ignored(&status, signal))
}

/// `SigIgn` of a `/proc/…/status` is a mask in hexadecimal, signal 1 its lowest bit.
#[cfg(unix)]
fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}

#[cfg(all(test, unix))]
mod tests {
    use super::is_ignored;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        let status = "Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        assert!(is_ignored(status, 1) && is_ignored(status, 13));
        assert!(!is_ignored(status, 2) && !is_ignored(status, 15));
        assert!(!is_ignored("", 1) && !is_ignored("SigIgn:\tx\n", 1));
    }
}
