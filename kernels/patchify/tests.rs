use candle_core::Tensor;

use super::*;
use crate::linear::{Linear, LinearArgs};
use crate::testing::{assert_bits, assert_close, normal, refused, tape_grads, values, var};
use crate::Exec;

fn patchify(x_bcfyx: &Tensor, patch: Patch) -> Tensor {
    Exec::cpu().run::<Patchify>(&PatchifyArgs { x_bcfyx, patch }).unwrap()
}

#[test]
fn tokens_times_the_flat_weight_are_the_strided_convolution() {
    let [b, c, f, y, x, d] = [2, 3, 2, 6, 4, 5];
    let (latent, weight) = (normal(1, &[b, c, f, y, x]), normal(2, &[d, c, 1, 2, 2]));
    let tokens = patchify(&latent, [1, 2, 2]);
    let args = LinearArgs {
        x: &tokens,
        weight_oi: &weight.flatten_from(1).unwrap(),
        bias_o: None,
        base: None,
        out: DType::F32,
    };
    let got = Exec::cpu().run::<Linear>(&args).unwrap();
    let kernel = weight.squeeze(2).unwrap();
    let frames: Vec<Tensor> = (0..f)
        .map(|i| {
            let frame = latent.narrow(2, i, 1).unwrap().squeeze(2).unwrap();
            frame.conv2d(&kernel, 0, 2, 1, 1).unwrap().flatten_from(2).unwrap().transpose(1, 2).unwrap()
        })
        .collect();
    assert_close(&got, &Tensor::cat(&frames, 1).unwrap(), 1e-5);
}

#[test]
fn unpatchify_puts_each_value_where_the_head_means_it() {
    let (b, c, grid, patch) = (2, 3, [2, 3, 2], [2, 1, 3]);
    let (l, d) = (12, c * 6);
    let tokens = normal(1, &[b, l, d]);
    let args = UnpatchifyArgs { tokens_bld: &tokens, grid, patch };
    let video = Exec::cpu().run::<Unpatchify>(&args).unwrap();
    assert_eq!(video.dims(), [b, c, 4, 3, 6]);
    let tokens = values(&tokens);
    for (at, got) in values(&video).into_iter().enumerate() {
        let (x, y, f, c_, b_) = (at % 6, at / 6 % 3, at / 18 % 4, at / 72 % c, at / (72 * c));
        let token = (f / 2 * 3 + y) * 2 + x / 3;
        let inside = (f % 2 * 3 + x % 3) * c + c_;
        assert_eq!(got, tokens[(b_ * l + token) * d + inside]);
    }
}

#[test]
fn backward_equals_the_tape() {
    for (grid, patch, c) in [([2, 3, 5], [1, 2, 2], 16), ([1, 1, 1], [1, 2, 2], 1), ([3, 1, 2], [2, 3, 1], 4)] {
        let l: usize = grid.iter().product();
        let d = c * patch.iter().product::<usize>();
        let tokens = var(&normal(1, &[2, l, d]));
        let video = Exec::cpu().run::<Unpatchify>(&UnpatchifyArgs { tokens_bld: &tokens, grid, patch }).unwrap();
        let dvideo = normal(2, video.dims());
        let want = &tape_grads(&video, &dvideo, &[&tokens])[0];
        let args = UnpatchifyBackwardArgs { dx_bcfyx: &dvideo, patch };
        assert_bits(&Exec::cpu().run::<UnpatchifyBackward>(&args).unwrap(), want);
    }
}

#[test]
fn the_gates_name_what_is_wrong() {
    let latent = normal(1, &[1, 16, 2, 5, 4]);
    let message = refused(Exec::cpu().run::<Patchify>(&PatchifyArgs { x_bcfyx: &latent, patch: [1, 2, 2] }));
    assert_eq!(message, "patchify: latent of 2 x 5 x 4 does not divide into patches of 1 x 2 x 2");
    let message = refused(Exec::cpu().run::<Patchify>(&PatchifyArgs { x_bcfyx: &latent, patch: [1, 0, 2] }));
    assert!(message.contains("1 x 0 x 2"), "{message}");
    let tokens = normal(1, &[1, 6, 10]);
    let run =
        |grid, patch| refused(Exec::cpu().run::<Unpatchify>(&UnpatchifyArgs { tokens_bld: &tokens, grid, patch }));
    assert!(run([1, 2, 2], [1, 2, 2]).contains("tokens_bld"));
    assert!(run([1, 2, 3], [1, 2, 2]).contains("token width 10 is not a multiple of the patch volume 4"));
}
