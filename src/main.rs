//! Parse, resolve, run the verb, map the result to an exit code.

use std::process::ExitCode;

use wan_train::error::UserError;
use wan_train::{cli, commands, report};

fn main() -> ExitCode {
    wan_kernels::heap::map_large_buffers();
    report::trace::start();
    let invocation = match cli::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match commands::run(invocation) {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let exit = error.downcast_ref::<UserError>().map_or(1, |user| user.exit);
            ExitCode::from(exit)
        }
    }
}

/// `wan-train show | head` is not a failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
