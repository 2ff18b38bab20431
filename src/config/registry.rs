//! The data files of the program, embedded: `configs/{models,templates,datasets,tokenizer}`.

use include_dir::{include_dir, Dir};

use crate::error::{nearest, UserError};

static CONFIGS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/configs");

/// An embedded file by its path under `configs/`.
pub fn bytes(path: &str) -> Option<&'static [u8]> {
    CONFIGS.get_file(path).map(|f| f.contents())
}

/// An embedded text file by its path under `configs/`.
pub fn text(path: &str) -> Option<&'static str> {
    CONFIGS.get_file(path).and_then(|f| f.contents_utf8())
}

/// Every embedded file below a directory of `configs/`, as (path under `configs/`, contents), sorted by path.
pub fn files_under(dir: &str) -> Vec<(String, &'static [u8])> {
    fn walk(dir: &'static Dir<'static>, out: &mut Vec<(String, &'static [u8])>) {
        out.extend(dir.files().map(|f| (f.path().to_string_lossy().into_owned(), f.contents())));
        dir.dirs().for_each(|d| walk(d, out));
    }
    let mut out = Vec::new();
    let root = if dir.is_empty() { Some(&CONFIGS) } else { CONFIGS.get_dir(dir) };
    if let Some(d) = root {
        walk(d, &mut out);
    }
    out.sort();
    out
}

/// Names of the templates that users may give, sorted. A file that starts with `_` is a part of others.
pub fn template_names() -> Vec<String> {
    names("templates")
}

/// Names of the tasks that have an architecture file, sorted.
pub fn model_names() -> Vec<String> {
    names("models")
}

/// Where the high-noise expert takes over (0..1), for tasks with two experts.
pub fn expert_boundary(task: &str) -> Option<f64> {
    let table: toml::Table = text(&format!("models/{task}.toml"))?.parse().ok()?;
    table.get("experts")?.get("boundary")?.as_float()
}

fn names(dir: &str) -> Vec<String> {
    files_under(dir)
        .into_iter()
        .filter_map(|(path, _)| path.rsplit('/').next()?.strip_suffix(".toml").map(str::to_owned))
        .filter(|name| !name.starts_with('_'))
        .collect()
}

/// The text of a built-in template.
pub fn template(name: &str) -> Result<&'static str, UserError> {
    text(&format!("templates/{name}.toml")).ok_or_else(|| {
        let known = template_names();
        let error = UserError::usage(format!("there is no template named `{name}`"));
        match nearest(name, known.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("did you mean `{near}`? `wan-train show` lists all templates")),
            None => error.hint(format!("the templates are: {}", known.join(", "))),
        }
    })
}
