//! The documents agree with the program.

use std::path::Path;

use wan_train::config::options_markdown;

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn the_option_list_is_what_the_program_prints() {
    let hint = "write it anew: wan-train show options > docs/options.md";
    assert!(read("docs/options.md") == options_markdown(), "docs/options.md is out of date; {hint}");
}

/// Every relative link of a document leads to a file, and every test that the migration guide names exists.
#[test]
fn links_and_names_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut documents = vec![root.join("README.md"), root.join("CONTRIBUTING.md")];
    documents.extend(std::fs::read_dir(root.join("docs")).unwrap().map(|e| e.unwrap().path()));
    for document in documents.iter().filter(|d| d.extension().is_some_and(|e| e == "md")) {
        let text = std::fs::read_to_string(document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = document.parent().unwrap().join(target);
            assert!(path.exists(), "{}: {link} leads nowhere", document.display());
        }
    }
    let mut sources = String::new();
    let mut stack = vec![root.join("tests"), root.join("src"), root.join("models"), root.join("kernels")];
    while let Some(dir) = stack.pop() {
        for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            match path.is_dir() {
                true => stack.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => {
                    sources += &std::fs::read_to_string(&path).unwrap()
                }
                false => {}
            }
        }
    }
    // In the table of tests, code that is no path and looks like a function is the name of one.
    let guide = read("docs/migration.md");
    let table = guide.split("## Where each difference is tested").nth(1).unwrap();
    let names = table.split('`').skip(1).step_by(2).map(|code| code.rsplit("::").next().unwrap());
    let functions: Vec<&str> = names.filter(|n| n.matches('_').count() >= 3 && !n.starts_with("--")).collect();
    assert!(functions.len() > 25, "{}", functions.len());
    for function in functions {
        assert!(
            sources.contains(&format!("fn {function}(")),
            "docs/migration.md names {function}, which no test is called"
        );
    }
}

/// The Rust sources of the program, with the continued lines of their string literals joined.
fn program_text() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    let mut stack = vec![root.join("src"), root.join("models"), root.join("kernels")];
    while let Some(dir) = stack.pop() {
        for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            match path.is_dir() {
                true => stack.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => {
                    text += &std::fs::read_to_string(&path).unwrap()
                }
                false => {}
            }
        }
    }
    let joined: Vec<&str> =
        text.split("\\\n").enumerate().map(|(i, t)| if i == 0 { t } else { t.trim_start() }).collect();
    joined.concat()
}

/// The messages that the troubleshooting page quotes are messages of the program; `…` stands for what varies.
#[test]
fn quoted_messages_exist() {
    let program = program_text();
    let page = read("docs/troubleshooting.md");
    let quoted: Vec<&str> = page.lines().filter_map(|l| l.strip_prefix("    ")).collect();
    assert!(quoted.len() > 15, "{}", quoted.len());
    for line in quoted {
        let pieces: Vec<&str> = line.split('…').map(str::trim).filter(|p| p.len() > 6).collect();
        assert!(!pieces.is_empty(), "`{line}` says nothing");
        for piece in pieces {
            assert!(program.contains(piece), "`{piece}` is no message of the program ({line})");
        }
    }
}

/// Functions and types that the pages about the engine name are in the sources.
#[test]
fn named_functions_exist() {
    let program = program_text();
    for page in ["docs/backward.md", "docs/memory.md"] {
        let text = read(page);
        for code in text.split('`').skip(1).step_by(2).filter(|c| c.contains("::") && !c.contains(char::is_whitespace))
        {
            let name = code.rsplit("::").next().unwrap();
            let found = program.contains(&format!("fn {name}")) || program.contains(&format!("{name} "));
            assert!(found || read("tests/train/run.rs").contains(&format!("fn {name}(")), "{page} names {code}");
        }
    }
}
