//! What the program tells about its own working: phases with their times, retries. Nothing of it is shown unless
//! `RUST_LOG` asks (`RUST_LOG=debug`, or `wan_train=debug` for this program's own part); warnings always are.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FmtSpan, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::EnvFilter;

/// Libraries report faults that are handled here, so only our own warnings are shown by default.
const DEFAULT: &str = "off,wan_train=warn,wan_models=warn,wan_kernels=warn";

/// Sends events to stderr from here on. A second call changes nothing.
pub fn start() {
    let asked = std::env::var("RUST_LOG").ok().filter(|asked| !asked.is_empty());
    let (filter, wrong) = match asked.as_deref().map(EnvFilter::try_new) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(e)) => (EnvFilter::new(DEFAULT), Some(e)),
        None => (EnvFilter::new(DEFAULT), None),
    };
    let set = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::CLOSE)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .event_format(Line)
        .try_init();
    if let (Ok(()), Some(e)) = (set, wrong) {
        tracing::warn!("RUST_LOG cannot be read: {e}");
    }
}

/// `warning: text`, as every other line of the program; from debug on with the phase in which it happened.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        let word = match level {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "note",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        write!(out, "{word}: ")?;
        if level >= Level::DEBUG {
            for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
                write!(out, "{}: ", span.name())?;
            }
        }
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
