//! Prompt files in their three forms, and everything that can be wrong in them.

use std::path::{Path, PathBuf};

use wan_models::arch::Conditioning;
use wan_train::train::preview::fit::fit;
use wan_train::train::preview::prompts::{read, Prompt};

use super::support::{arch, model_config};

fn written(name: &str, text: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

fn parsed(name: &str, text: &str) -> Vec<Prompt> {
    let (_dir, path) = written(name, text);
    read(&path).unwrap_or_else(|e| panic!("{e:#}"))
}

#[track_caller]
fn refused(name: &str, text: impl AsRef<[u8]>, words: &[&str]) {
    let (_dir, path) = written(name, text);
    let said = format!("{:#}", read(&path).unwrap_err());
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

/// Everything but the place.
fn plain(prompts: Vec<Prompt>) -> Vec<Prompt> {
    prompts.into_iter().map(|p| Prompt { place: String::new(), ..p }).collect()
}

fn full() -> Prompt {
    Prompt {
        text: "a cat, 3 -- no, 4 paws".into(),
        negative: Some("blurry, low quality".into()),
        width: 832,
        height: 480,
        frames: 21,
        seed: Some(1 << 40),
        steps: 30,
        guidance: Some(3.5),
        shift: Some(5.0),
        image: Some("a b.png".into()),
        end_image: Some("e.png".into()),
        control_video: Some("c.mp4".into()),
        ..Prompt::default()
    }
}

#[test]
fn a_line_holds_all_there_is_in_any_order_and_case() {
    let all = parsed(
        "p.txt",
        "\u{feff}# a comment\n\n  a cat, 3 -- no, 4 paws --W 832 --h 480 --f 21 --d 1099511627776 --S 30 --l 3.5 --fs 5 \
         --n blurry, low quality --i a b.png --ei e.png --cn c.mp4\nI am N times H12 w 5\n",
    );
    assert_eq!((all[0].place.as_str(), all[1].place.as_str()), ("p.txt, line 3", "p.txt, line 4"));
    let all = plain(all);
    assert_eq!(all[0], full());
    // The old tool's defaults; and a prompt's own words are no options.
    let bare =
        Prompt { text: "I am N times H12 w 5".into(), width: 256, height: 256, frames: 1, steps: 20, ..<_>::default() };
    assert_eq!(all[1], bare);
    // An empty negative prompt is one.
    assert_eq!(parsed("p.txt", "a --n")[0].negative.as_deref(), Some(""));
}

#[test]
fn toml_has_defaults_and_json_tables_or_lines() {
    let toml = r#"
[prompt]
width = 832
height = 100
frame_count = 21
negative_prompt = "blurry, low quality"
[[prompt.subset]]
prompt = "a cat, 3 -- no, 4 paws"
height = 480
seed = 1099511627776
sample_steps = 30
cfg_scale = 3.5
discrete_flow_shift = 5
image_path = "a b.png"
end_image_path = "e.png"
control_video_path = "c.mp4"
[[prompt.subset]]
prompt = "another"
"#;
    let all = parsed("p.toml", toml);
    assert_eq!(all[1].place, "p.toml, line 17");
    assert_eq!((all[1].width, all[1].height, all[1].frames), (832, 100, 21));
    assert_eq!(plain(all)[0], full());
    let json = r#"[{"prompt": "a cat, 3 -- no, 4 paws", "width": 832, "height": 480, "frame_count": 21, "enum": 0,
        "seed": 1099511627776, "sample_steps": 30, "cfg_scale": 3.5, "discrete_flow_shift": 5, "image_path": "a b.png",
        "end_image_path": "e.png", "control_video_path": "c.mp4", "negative_prompt": "blurry, low quality"},
        "a dog --w 64 --f 5"]"#;
    let all = parsed("P.JSON", json);
    assert_eq!((all[1].place.as_str(), all[1].width, all[1].frames), ("P.JSON, prompt 2", 64, 5));
    assert_eq!(plain(all)[0], full());
}

#[test]
fn what_is_for_other_models_is_said() {
    let notes = &parsed("p.txt", "a --g 7")[0].notes;
    assert!(notes.len() == 1 && notes[0].contains("--l"), "{notes:?}");
}

#[test]
fn everything_that_is_wrong_is_listed_with_its_place() {
    refused(
        "p.txt",
        "a --w x\nb --width 5\nc --q 5\n--w 64\nd --s 0\ne --w 64 --w 32\nf --h\ng --of target_index=1\nh --f -5\ni --l -1\nj --fs 0\n",
        &[
            "11 things are wrong",
            "p.txt, line 1: width cannot be \"x\"",
            "line 2: unknown option `--width`; did you mean `--w` (width)?",
            "line 3: unknown option `--q`; there are --w --h",
            "line 4: there is no prompt",
            "line 5: sample_steps cannot be 0",
            "line 6: --w (width) is given twice",
            "line 7: --h (height) has no value",
            "line 8: one_frame is for one-frame previews",
            "line 9: frame_count cannot be",
            "line 10: cfg_scale cannot be -1",
            "line 11: discrete_flow_shift",
        ],
    );
    refused(
        "p.toml",
        "[prompt]\nwdth = 5\n[[prompt.subset]]\nprompt = \"a\"\nw = 3\n[[prompt.subset]]\nprompt = 5\n",
        &[
            "p.toml, line 2: unknown key `wdth`; did you mean `width`?",
            "line 5: unknown key `w`; did you mean `width`?",
            "line 6: prompt cannot be 5",
            "line 6: there is no prompt",
        ],
    );
    refused("p.toml", "[prompts]\nwidth = 5\n", &["unknown key `prompts`; did you mean `prompt`?", "no [prompt]"]);
    refused("p.toml", "[prompt\n", &["p.toml, line 1"]);
    refused("p.toml", "[prompt]\nsubset = 5\n", &["[[prompt.subset]]"]);
    refused("p.json", "[{\"prompt\": \"a\",]", &["p.json, line 1, column"]);
    refused("p.json", "{\"prompt\": \"a\"}", &["the file is a list"]);
    refused("p.json", "[5, {\"prompt\": \"a\", \"hight\": 5}, \"b --w\"]", &["prompt 1", "`height`", "prompt 3: --w"]);
    refused("p.txt", "# nothing\n\n", &["holds no prompt"]);
    refused("p.txt", b"fine\ncaf\xe9", &["not UTF-8 (line 2)"]);
    refused("p.yaml", "a: b", &[".txt, .toml, .json"]);
    let said = format!("{:#}", read(Path::new("nowhere.txt")).unwrap_err());
    assert!(said.contains("nowhere.txt") && said.contains("--sample_prompts"), "{said}");
}

#[test]
fn sizes_are_rounded_down_and_pictures_must_fit_the_task() {
    let dir = tempfile::tempdir().unwrap();
    image::RgbImage::new(8, 8).save(dir.path().join("a.png")).unwrap();
    std::fs::write(dir.path().join("torn.png"), b"no picture").unwrap();
    let check = |conditioning, change: fn(&mut Prompt)| {
        let mut prompt = Prompt { text: "a".into(), width: 100, height: 47, frames: 8, steps: 4, ..Prompt::default() };
        change(&mut prompt);
        let faults = fit(&mut prompt, &model_config(arch(), conditioning), dir.path());
        (prompt, faults.join("; "))
    };
    let (prompt, faults) = check(Conditioning::None, |p| p.image = Some("a.png".into()));
    assert_eq!((prompt.width, prompt.height, prompt.frames, faults.as_str()), (96, 32, 5, ""));
    assert_eq!(prompt.notes.len(), 4, "{:?}", prompt.notes);
    assert_eq!(prompt.image, None, "a text-to-video model has no use for it, and that is a note");
    assert!(check(Conditioning::None, |p| p.height = 15).1.contains("too small"));
    assert!(check(Conditioning::FirstFrame, |_| {}).1.contains("needs a start picture: --i FILE"));
    assert!(check(Conditioning::FirstFrame, |p| p.image = Some("b.png".into()))
        .1
        .contains("b.png (--i) does not exist"));
    assert!(check(Conditioning::FirstFrame, |p| p.image = Some("torn.png".into())).1.contains("cannot be read"));
    // Found beside the prompt file.
    let (prompt, faults) = check(Conditioning::FirstFrame, |p| p.image = Some("a.png".into()));
    assert_eq!((prompt.image, faults.as_str()), (Some(dir.path().join("a.png")), ""));
    assert!(check(Conditioning::FirstLastFrame, |p| p.image = Some("a.png".into())).1.contains("end picture: --ei"));
    assert!(check(Conditioning::Control, |_| {}).1.contains("control video: --cn"));
    assert_eq!(check(Conditioning::CleanFirstFrame, |_| {}).1, "");
}
