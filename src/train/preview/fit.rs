//! Prompts held against the task and the disk: sizes that the model can make, pictures that are there.

use std::path::{Path, PathBuf};

use wan_models::arch::{Conditioning, ModelConfig};

use super::prompts::Prompt;
use crate::data::{picture, video};

/// Frames of a latent frame, but for the first.
const TEMPORAL: usize = 4;

/// Rounds the sizes of a prompt down to what the model makes, with a note, and finds its pictures: as the path is typed, or
/// else beside the prompt file in `dir`. Returns what is wrong, each a sentence.
pub fn fit(prompt: &mut Prompt, model: &ModelConfig, dir: &Path) -> Vec<String> {
    let mut faults = Vec::new();
    let task = &model.task;
    let [_, rows, columns] = model.arch.patch;
    let [_, down, across] = model.vae.kind.stride();
    for (what, side, unit) in
        [("width", &mut prompt.width, across * columns), ("height", &mut prompt.height, down * rows)]
    {
        let floored = *side / unit * unit;
        match floored {
            0 => faults.push(format!("{what} {side} is too small: {task} makes multiples of {unit}")),
            n if n < *side => prompt.notes.push(format!("{what} {side} becomes {n}, a multiple of {unit}")),
            _ => {}
        }
        *side = floored;
    }
    let frames = (prompt.frames - 1) / TEMPORAL * TEMPORAL + 1;
    if frames != prompt.frames {
        prompt.notes.push(format!("{} frames become {frames}, 4n+1", prompt.frames));
        prompt.frames = frames;
    }

    use Conditioning::*;
    let takes_first = !matches!(model.conditioning, None | Control);
    let needs_first = takes_first && model.conditioning != CleanFirstFrame;
    let takes_last = model.conditioning == FirstLastFrame;
    let takes_control = matches!(model.conditioning, Control | ControlFirstFrame);
    if takes_first && model.conditioning == CleanFirstFrame && prompt.image.is_some() && prompt.frames == 1 {
        faults.push("--i with a single frame leaves nothing to make: ask for 5 frames or more (--f)".into());
    }
    if takes_last && prompt.frames == 1 {
        faults.push(format!("{task} makes clips between two pictures: ask for 5 frames or more (--f)"));
    }
    for (option, what, path, takes, needs) in [
        ("i", "start picture", &mut prompt.image, takes_first, needs_first),
        ("ei", "end picture", &mut prompt.end_image, takes_last, takes_last),
        ("cn", "control video", &mut prompt.control_video, takes_control, takes_control),
    ] {
        match path {
            Option::None if needs => faults.push(format!("{task} needs a {what}: --{option} FILE")),
            Option::Some(_) if !takes => {
                prompt.notes.push(format!("--{option} is not used: {task} takes no {what}"));
                *path = Option::None;
            }
            Option::Some(at) => match find(at, dir) {
                Some(found) => *at = found,
                Option::None => faults.push(format!("the {what} {} (--{option}) does not exist", at.display())),
            },
            Option::None => {}
        }
    }
    for path in [&prompt.image, &prompt.end_image].into_iter().flatten().filter(|p| p.is_file()) {
        if let Err(e) = picture::probe(path, true) {
            faults.push(format!("the picture {} cannot be read: {e:#}", path.display()));
        }
    }
    if let Some(path) = prompt.control_video.as_ref().filter(|p| p.is_file()) {
        match video::probe(path, true, false) {
            Err(e) => faults.push(format!("the control video {} cannot be read: {e:#}", path.display())),
            Ok(facts) if facts.frames < prompt.frames => faults.push(format!(
                "the control video {} has {} frames, fewer than the {} asked for",
                path.display(),
                facts.frames,
                prompt.frames
            )),
            Ok(_) => {}
        }
    }
    faults
}

fn find(path: &Path, dir: &Path) -> Option<PathBuf> {
    [path.to_path_buf(), dir.join(path)].into_iter().find(|p| p.is_file())
}
