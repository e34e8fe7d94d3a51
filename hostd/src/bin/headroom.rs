//! The command line of an operator.

fn main() -> std::process::ExitCode {
    hostd::cli::main()
}
