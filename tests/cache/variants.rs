//! What else latent files may hold: first-frame conditions, control latents.

use std::fs;

use candle_core::{DType, Device, Tensor};
use wan_train::cache::index::load_latents;
use wan_train::cache::recipe::Freshness;

use super::kitchen::{load_clip, picture, Kitchen};

const CAT: &str = "cache/pictures/a_cat_0064x0048_wan.safetensors";
const DOG: &str = "cache/pictures/dog_0040x0040_wan.safetensors";
const WALK: &str = "cache/videos/walk_00000-005_0048x0032_wan.safetensors";

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn image_to_video_stores_the_first_frame() {
    let mut kitchen = Kitchen::new();
    kitchen.options.i2v = true;
    kitchen.options.vae_dtype = DType::F32;
    assert!(Kitchen::new().survey().1.notes().is_empty());
    let note = kitchen.survey().1.notes().remove(0);
    assert!(note.starts_with("2 still images") && note.contains("--i2v_images_as_t2v"), "{note}");
    kitchen.cook().ok();
    let clip = load_latents(&kitchen.path(WALK)).unwrap();
    let image = clip.latents_image.unwrap();
    assert_eq!(image.dims(), [8, 2, 4, 6]);
    for channel in 0..4 {
        let mask = image.get(channel).unwrap();
        assert!(values(&mask.get(0).unwrap()).iter().all(|v| *v == 1.0));
        assert!(values(&mask.get(1).unwrap()).iter().all(|v| *v == 0.0));
    }
    // Frame 0 is seen alone by the VAE: its latents are those of the clip.
    let first = |t: &Tensor| values(&t.narrow(1, 0, 1).unwrap());
    assert_eq!(first(&image.narrow(0, 4, 4).unwrap()), first(&clip.latents));

    let still = load_latents(&kitchen.path(CAT)).unwrap();
    let image = still.latents_image.unwrap();
    assert_eq!(values(&image.narrow(0, 4, 4).unwrap()), values(&still.latents), "a picture is its own condition");
    assert!(values(&image.narrow(0, 0, 4).unwrap()).iter().all(|v| *v == 1.0));

    kitchen.options.i2v_images_as_t2v = true;
    assert!(kitchen.survey().1.notes().is_empty());
    let meal = kitchen.cook().ok();
    assert!(meal.row("a_cat.png").contains("made without i2v_images_as_t2v"), "{}", meal.table());
    assert!(meal.row("frames/walk").contains("2 reused"), "videos are not concerned: {}", meal.table());
    let (cat, dog) = (load_latents(&kitchen.path(CAT)).unwrap(), load_latents(&kitchen.path(DOG)).unwrap());
    assert_eq!(values(&cat.latents), values(&still.latents));
    let image = cat.latents_image.unwrap();
    assert!(values(&image.narrow(0, 0, 4).unwrap()).iter().all(|v| *v == 0.0));
    assert_eq!(values(&image), values(&dog.latents_image.unwrap()), "an empty frame, whatever the picture shows");

    // What image-to-video needs, text-to-video leaves alone.
    kitchen.options.i2v = false;
    kitchen.models = false;
    kitchen.cook().ok();
}

fn features(kitchen: &Kitchen, file: &str) -> Tensor {
    load_latents(&kitchen.path(file)).unwrap().clip.unwrap()
}

#[test]
fn wan_2_1_image_to_video_stores_clip_features() {
    let mut kitchen = Kitchen::new();
    kitchen.cook().ok();
    kitchen.options.i2v = true;
    kitchen.options.clip = true;
    kitchen.options.clip_vision = Some("clip one".into());
    assert!(kitchen.cook().error().contains("no CLIP weights are given"));
    kitchen.with_clip = true;
    let meal = kitchen.cook().ok();
    assert!(meal.row("a_cat.png").contains("lacks the first-frame condition"), "{}", meal.table());
    let cat = features(&kitchen, CAT);
    assert_eq!((cat.dims(), cat.dtype()), (&[5, 16][..], DType::F16));
    // What the file holds is what the tower makes of the pixels in [-1,1].
    let pixels: Vec<f32> =
        frame(&kitchen, "frames/walk/000.png").into_iter().map(|v| f32::from(v) / 127.5 - 1.0).collect();
    let pixels = Tensor::from_vec(pixels, (1, 32, 48, 3), &Device::Cpu).unwrap().permute((0, 3, 1, 2)).unwrap();
    let expected = load_clip(true).unwrap().encode(&pixels.contiguous().unwrap()).unwrap().squeeze(0).unwrap();
    let expected = values(&expected.to_dtype(DType::F16).unwrap());
    let error = values(&features(&kitchen, WALK)).iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error <= 2e-3, "{error}: more than a rounding of fp16");

    kitchen.options.clip_vision = Some("clip two".into());
    let (_, survey) = kitchen.survey();
    let stale = |s: &Freshness| matches!(s, Freshness::Stale(why) if why == "made with another CLIP");
    assert!(survey.entries.iter().flat_map(|e| &e.clips).all(|c| stale(&c.state)));
}

fn frame(kitchen: &Kitchen, file: &str) -> Vec<u8> {
    image::open(kitchen.path(file)).unwrap().to_rgb8().into_raw()
}

#[test]
fn first_last_frame_to_video_stores_both_ends() {
    let mut kitchen = Kitchen::new();
    kitchen.options.i2v = true;
    kitchen.options.clip = true;
    kitchen.options.clip_vision = Some("clip one".into());
    kitchen.options.vae_dtype = DType::F32;
    kitchen.with_clip = true;
    kitchen.cook().ok();
    let (one, first) = (features(&kitchen, WALK), load_latents(&kitchen.path(WALK)).unwrap().latents_image.unwrap());
    kitchen.options.last_frame = true;
    let meal = kitchen.cook().ok();
    assert!(meal.row("frames/walk").contains("2 cached"), "{}", meal.table());
    let both = features(&kitchen, WALK);
    assert_eq!(both.dims(), [2, 5, 16]);
    assert_eq!(values(&both.get(0).unwrap()), values(&one));
    assert_ne!(values(&both.get(1).unwrap()), values(&one));
    let image = load_latents(&kitchen.path(WALK)).unwrap().latents_image.unwrap();
    let column =
        |t: &Tensor, f: usize| -> Vec<f32> { (0..4).map(|c| values(&t.get(c).unwrap().get(f).unwrap())[0]).collect() };
    assert_eq!((column(&image, 0), column(&image, 1)), (vec![1.0; 4], vec![0.0, 0.0, 0.0, 1.0]));
    assert_eq!((column(&first, 0), column(&first, 1)), (vec![1.0; 4], vec![0.0; 4]));
    // A picture is its own first and last frame.
    let cat = features(&kitchen, CAT);
    assert_eq!(values(&cat.get(0).unwrap()), values(&cat.get(1).unwrap()));
    kitchen.models = false;
    kitchen.cook().ok();
}

#[test]
fn controls_are_encoded_and_watched() {
    let kitchen = Kitchen::new();
    fs::create_dir(kitchen.path("controls")).unwrap();
    picture(64, 48, 77).save(kitchen.path("controls/a_cat.png")).unwrap();
    picture(40, 40, 78).save(kitchen.path("controls/dog.png")).unwrap();
    let control = format!("target_frames = [5]\n[[datasets]]\nimage_directory = \"{0}/pictures\"\ncontrol_directory = \"{0}/controls\"\ncache_directory = \"{0}/cache/controlled\"", kitchen.path("").display().to_string().trim_end_matches('/'));
    kitchen.write_config("resolution = [48, 32]", &control);
    kitchen.cook().ok();
    let path = kitchen.path("cache/controlled/a_cat_0064x0048_wan.safetensors");
    let tensors = load_latents(&path).unwrap();
    let control = tensors.latents_control.unwrap();
    assert_eq!(control.dims(), tensors.latents.dims());
    assert_ne!(values(&control), values(&tensors.latents));

    picture(64, 48, 79).save(kitchen.path("controls/a_cat.png")).unwrap();
    let (_, survey) = kitchen.survey();
    let state = survey.entries.iter().flat_map(|e| &e.clips).find(|c| c.path == path).unwrap().state.clone();
    assert!(matches!(&state, Freshness::Stale(why) if why.starts_with("control: ")), "{state:?}");

    // A cache made before the control directory was set lacks the control.
    let without = kitchen.path("cache/pictures/dog_0040x0040_wan.safetensors");
    fs::copy(without, kitchen.path("cache/controlled/dog_0040x0040_wan.safetensors")).unwrap();
    let (_, survey) = kitchen.survey();
    let dog = survey
        .entries
        .iter()
        .flat_map(|e| &e.clips)
        .find(|c| c.path.ends_with("controlled/dog_0040x0040_wan.safetensors"));
    assert!(
        matches!(&dog.unwrap().state, Freshness::Stale(why) if why.contains("control")),
        "{:?}",
        dog.unwrap().state
    );
    kitchen.cook().ok();
}

#[test]
fn a_control_of_another_size_is_refused_by_name() {
    let kitchen = Kitchen::new();
    fs::create_dir(kitchen.path("controls")).unwrap();
    picture(96, 96, 77).save(kitchen.path("controls/a_cat.png")).unwrap();
    picture(96, 96, 78).save(kitchen.path("controls/dog.png")).unwrap();
    let root = kitchen.path("").display().to_string();
    let root = root.trim_end_matches('/');
    let control = format!(
        "target_frames = [5]\n[[datasets]]\nimage_directory = \"{root}/pictures\"\ncontrol_directory = \
         \"{root}/controls\"\nno_resize_control = true\ncache_directory = \"{root}/cache/controlled\""
    );
    kitchen.write_config("resolution = [48, 32]", &control);
    let error = kitchen.cook().error();
    assert!(error.contains("a_cat.png") && error.contains("no_resize_control"), "{error}");
}

/// Two controls and a target that stands between them in time.
fn one_frame(kitchen: &mut Kitchen, indices: &str, target: i64) {
    let root = kitchen.path("").display().to_string();
    let root = root.trim_end_matches('/');
    let config = format!(
        "[general]\nresolution = [48, 32]\ncaption_extension = \".txt\"\n[[datasets]]\nimage_directory = \"{root}/pictures\"\n\
         control_directory = \"{root}/controls\"\ncache_directory = \"{root}/cache/pictures\"\n\
         fp_1f_clean_indices = {indices}\nfp_1f_target_index = {target}\n"
    );
    fs::write(kitchen.path("dataset.toml"), config).unwrap();
    kitchen.options.i2v = true;
    kitchen.options.vae_dtype = DType::F32;
}

#[test]
fn one_frame_caches_hold_controls_and_target_as_frames_of_one_sequence() {
    let mut kitchen = Kitchen::new();
    fs::create_dir(kitchen.path("controls")).unwrap();
    for (name, seed) in [("a_cat_0", 71), ("a_cat_1", 72), ("dog_0", 73), ("dog_1", 74)] {
        picture(48, 32, seed).save(kitchen.path(&format!("controls/{name}.png"))).unwrap();
    }
    one_frame(&mut kitchen, "[0, 9]", 4);
    let note = kitchen.survey().1.notes().pop().unwrap();
    assert!(note.contains("fp_1f_target_index") && note.contains("--one_frame"), "{note}");

    kitchen.options.one_frame = true;
    kitchen.options.clip = true;
    kitchen.options.last_frame = true;
    kitchen.options.clip_vision = Some("clip one".into());
    kitchen.with_clip = true;
    assert!(kitchen.survey().1.notes().is_empty());
    let mut meal = kitchen.cook().ok();
    let cat = load_latents(&kitchen.path(CAT)).unwrap();
    assert_eq!(cat.latents.dims(), [4, 3, 4, 6]);
    assert_eq!(cat.positions.unwrap().to_vec1::<i32>().unwrap(), [0, 4, 9]);
    assert!(cat.latents_control.is_none());
    let condition = cat.latents_image.unwrap();
    let frame = |t: &Tensor, f: usize| values(&t.narrow(1, f, 1).unwrap());
    let (mask, given) = (condition.narrow(0, 0, 4).unwrap(), condition.narrow(0, 4, 4).unwrap());
    for (f, clean) in [(0, 1.0), (1, 0.0), (2, 1.0)] {
        assert!(frame(&mask, f).iter().all(|v| *v == clean), "frame {f}");
        assert_eq!(frame(&given, f) == frame(&cat.latents, f), clean == 1.0, "frame {f}");
    }
    // Each frame is what the VAE makes of that picture alone.
    let vae = kitchen.load_vae().unwrap();
    let alone = |file: &str| {
        let picture = std::sync::Arc::new(image::open(kitchen.path(file)).unwrap().to_rgb8());
        values(&wan_train::cache::latents::encode_frames(&vae, &[picture], &Device::Cpu).unwrap())
    };
    assert_eq!(frame(&cat.latents, 0), alone("controls/a_cat_0.png"));
    assert_eq!(frame(&cat.latents, 2), alone("controls/a_cat_1.png"));
    // The empty frame is the same for every item, and CLIP sees the controls in their order.
    let dog = load_latents(&kitchen.path(DOG)).unwrap();
    assert_eq!(frame(&dog.latents_image.unwrap().narrow(0, 4, 4).unwrap(), 1), frame(&given, 1));
    let clip = cat.clip.unwrap();
    assert_eq!(clip.dims(), [2, 5, 16]);
    assert_ne!(values(&clip.get(0).unwrap()), values(&clip.get(1).unwrap()));

    // Training gets the positions, and buckets count the frames that the latents have.
    let index = wan_train::cache::CacheIndex::build(&mut meal.survey).unwrap();
    assert_eq!(index.load_item(0).unwrap().positions, Some(vec![0, 4, 9]));
    assert_eq!(index.buckets[0].key.frames, 9);

    kitchen.models = false;
    kitchen.cook().ok();
    one_frame(&mut kitchen, "[0, 9]", 5);
    let (_, survey) = kitchen.survey();
    let stale = |s: &Freshness| matches!(s, Freshness::Stale(why) if why.contains("[0, 9, 4], now [0, 9, 5]"));
    assert!(survey.entries.iter().flat_map(|e| &e.clips).all(|c| stale(&c.state)));
    kitchen.options.one_frame = false;
    let (_, survey) = kitchen.survey();
    assert!(survey.entries.iter().flat_map(|e| &e.clips).all(|c| !c.state.is_usable()));
}

#[test]
fn one_frame_needs_pictures_positions_and_controls() {
    let mut kitchen = Kitchen::new();
    kitchen.options.one_frame = true;
    kitchen.options.i2v = true;
    let refused = |kitchen: &Kitchen| {
        let config = wan_train::data::DatasetConfig::load(&kitchen.path("dataset.toml"), &kitchen.data).unwrap();
        wan_train::cache::Survey::take(&config, &[], &kitchen.options).unwrap_err().to_string()
    };
    let error = refused(&kitchen);
    assert!(error.contains("does not say where its frames stand") && error.contains("fp_1f_clean_indices"), "{error}");
    fs::create_dir(kitchen.path("controls")).unwrap();
    for (indices, target, want) in [("[0, 2000]", 1, "0 to 1023"), ("[0, 3]", 3, "where a control")] {
        one_frame(&mut kitchen, indices, target);
        assert!(refused(&kitchen).contains(want), "{}", refused(&kitchen));
    }
    kitchen.write_config("resolution = [48, 32]", "target_frames = [5]");
    let text = fs::read_to_string(kitchen.path("dataset.toml")).unwrap();
    let videos_only =
        text.split("[[datasets]]").enumerate().filter(|(i, _)| *i != 1).map(|(_, t)| t).collect::<Vec<_>>();
    fs::write(kitchen.path("dataset.toml"), videos_only.join("[[datasets]]")).unwrap();
    assert!(refused(&kitchen).contains("holds videos"));
    // A control of another size has no place beside the target.
    for name in ["a_cat", "dog"] {
        picture(96, 96, 7).save(kitchen.path(&format!("controls/{name}.png"))).unwrap();
    }
    one_frame(&mut kitchen, "[0]", 1);
    let text = fs::read_to_string(kitchen.path("dataset.toml")).unwrap();
    fs::write(kitchen.path("dataset.toml"), text + "no_resize_control = true\n").unwrap();
    let error = kitchen.cook().error();
    assert!(error.contains("1 control pictures of 48x32") && error.contains("[96x96]"), "{error}");
}
