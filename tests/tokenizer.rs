//! Cleaning and tokens against recorded results of the reference and of ftfy 6.3.1.

use std::path::Path;

use serde_json::Value;
use wan_train::tokenizer::{clean, for_text_encoder, read_spiece_tensor, UmT5Tokenizer, MAX_TOKENS};

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(format!("{TESTS}/{path}")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn golden_prompts() {
    let tokenizer = UmT5Tokenizer::embedded().unwrap();
    let golden = json("golden/07_tokenizer.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 20);
    let mut cut = 0;
    for case in cases {
        let prompt = text(&case["text"]);
        assert_eq!(clean(prompt), text(&case["cleaned"]), "cleaning {prompt:?}");
        let encoded = tokenizer.encode(prompt).unwrap();
        assert_eq!(encoded.ids, ids(&case["ids"]), "tokens of {prompt:?}");
        cut +=
            usize::from(encoded.truncated_from.is_some_and(|len| len > MAX_TOKENS && encoded.ids.len() == MAX_TOKENS));
    }
    assert!(cut > 0, "no golden prompt is long enough to be cut");
}

#[test]
fn golden_raw_tokens() {
    let tokenizer = UmT5Tokenizer::embedded().unwrap();
    for case in json("golden/07_tokenizer_raw.json")["cases"].as_array().unwrap() {
        let prompt = text(&case["text"]);
        assert_eq!(tokenizer.encode_raw(prompt).unwrap(), ids(&case["ids"]), "{prompt:?}");
    }
}

#[test]
fn cleaning_repairs_like_ftfy() {
    let vectors = json("data/clean_vectors.json");
    let vectors = vectors.as_array().unwrap();
    assert!(vectors.len() > 2000);
    let mut wrong = Vec::new();
    for case in vectors {
        let (given, fixed, cleaned) = (text(&case[0]), text(&case[1]), text(&case[2]));
        let got = clean::fix_text(given);
        if got != fixed {
            wrong.push(format!("fix_text({given:?})\n   got {got:?}\n  want {fixed:?}"));
        } else if clean(given) != cleaned {
            wrong.push(format!("clean({given:?})\n   got {:?}\n  want {cleaned:?}", clean(given)));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} differ:\n{}",
        wrong.len(),
        vectors.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

#[test]
fn truncation_is_reported() {
    let tokenizer = UmT5Tokenizer::embedded().unwrap();
    let whole = tokenizer.encode(&"cat ".repeat(511)).unwrap();
    assert_eq!((whole.ids.len(), whole.truncated_from), (512, None));
    let cut = tokenizer.encode(&"cat ".repeat(600)).unwrap();
    assert_eq!((cut.ids.len(), cut.truncated_from), (512, Some(601)));
    assert_eq!(cut.ids, whole.ids);
    let (ids, mask) = tokenizer.encode("cat").unwrap().padded(512);
    assert_eq!((ids.len(), mask.iter().sum::<u32>(), ids[2]), (512, 2, 0));
}

#[test]
fn sentencepiece_models_segment_like_sentencepiece() {
    for name in ["tiny", "plain"] {
        let model = std::fs::read(format!("{TESTS}/data/{name}.spiece.model")).unwrap();
        let tokenizer = UmT5Tokenizer::from_spiece(&model).unwrap();
        for case in json(&format!("data/{name}.spiece.json")).as_array().unwrap() {
            let prompt = text(&case[0]);
            assert_eq!(tokenizer.encode_raw(prompt).unwrap(), ids(&case[1]), "{name}: {prompt:?}");
        }
        // Special tokens are cut out before segmentation, as transformers does; SentencePiece itself would put a space
        // in front of the first.
        assert_eq!(tokenizer.encode_raw("<extra_id_0>").unwrap(), [4]);
        for end in [10, model.len() / 2, model.len() - 1] {
            assert!(UmT5Tokenizer::from_spiece(&model[..end]).is_err(), "{name} cut at {end} was accepted");
        }
    }
}

/// A safetensors file holding only the given U8 tensor.
fn safetensors_with(name: &str, bytes: &[u8], path: &Path) {
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], bytes).unwrap();
    std::fs::write(path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
}

#[test]
fn files_beside_or_inside_the_encoder_win() {
    let folder = tempfile::tempdir().unwrap();
    let encoder = folder.path().join("umt5.safetensors");
    let tiny = std::fs::read(format!("{TESTS}/data/tiny.spiece.model")).unwrap();
    let plain = std::fs::read(format!("{TESTS}/data/plain.spiece.model")).unwrap();

    safetensors_with("something", &[1, 2, 3], &encoder);
    assert_eq!(read_spiece_tensor(&encoder).unwrap(), None);
    let found = for_text_encoder(Some(&encoder), None).unwrap();
    assert!(found.path.is_none() && found.warning.is_none());

    safetensors_with("spiece_model", &tiny, &encoder);
    assert_eq!(read_spiece_tensor(&encoder).unwrap().unwrap(), tiny);
    let found = for_text_encoder(Some(&encoder), None).unwrap();
    assert_eq!(found.path.as_deref(), Some(encoder.as_path()));
    let warning = found.warning.unwrap();
    assert!(warning.contains("14 of 14") && warning.contains("umt5.safetensors"), "{warning}");

    let beside = folder.path().join("google/umt5-xxl");
    std::fs::create_dir_all(&beside).unwrap();
    std::fs::write(beside.join("spiece.model"), &plain).unwrap();
    let found = for_text_encoder(Some(&encoder), None).unwrap();
    assert_eq!(found.path, Some(beside.join("spiece.model")));
    assert_eq!(
        found.tokenizer.encode_raw("cat").unwrap(),
        UmT5Tokenizer::from_spiece(&plain).unwrap().encode_raw("cat").unwrap()
    );

    // The same tokenizer given as a file: nothing to warn about, and it wins over everything else.
    let own = folder.path().join("own.json");
    let packed =
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/tokenizer/umt5_tokenizer.json.zst")).unwrap();
    std::fs::write(&own, zstd::decode_all(&packed[..]).unwrap()).unwrap();
    let found = for_text_encoder(Some(&encoder), Some(&own)).unwrap();
    assert!(found.warning.is_none());
    assert_eq!(found.path, Some(own));
}

#[test]
fn wrong_tokenizer_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    for contents in ["{\"model\": 1}", "garbage", ""] {
        std::fs::write(&file, contents).unwrap();
        let error = match for_text_encoder(Some(&folder.path().join("umt5.safetensors")), None) {
            Ok(_) => panic!("{contents:?} was accepted"),
            Err(error) => format!("{error:#}"),
        };
        assert!(error.contains("tokenizer.json") && error.contains("hint:"), "{error}");
    }
    let torn = folder.path().join("torn.safetensors");
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&torn, [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    let error = format!("{:#}", for_text_encoder(Some(&torn), None).err().unwrap());
    assert!(error.contains("torn.safetensors"), "{error}");
}
