//! Linears that read one input, as queries, keys and values do: forward and backward on one page. Where all of them carry
//! a plain LoRA, the adapters work side by side, see [`wan_kernels::linear::Stack`]; any other adapter works alone.

use candle_core::Tensor;
use wan_kernels::linear::{
    Linear, LinearArgs, LinearBackward, LinearBackwardArgs, LinearStackBackward, LinearStackBackwardArgs,
    LinearWeightGrad, LinearWeightGradArgs, Stack,
};

use crate::adapter::Lora;
use crate::linear::Site;
use crate::wan::GradSink;
use crate::{Error, Result};

/// `N` linears at work on one input.
pub struct Siblings<'a, const N: usize> {
    pub sites: [Site<'a>; N],
}

/// What forward leaves for backward.
#[derive(Debug, Clone)]
pub struct SiblingsOut<const N: usize> {
    /// `[B, L, o]` each, in the compute dtype.
    pub ys: [Tensor; N],
    pub low: Low<N>,
}

/// Low-rank activations.
#[derive(Debug, Clone)]
pub enum Low<const N: usize> {
    /// Of all LoRAs side by side, `[B, L, R]`.
    Stacked(Tensor),
    /// Each one's own.
    Each([Option<Tensor>; N]),
}

impl<const N: usize> SiblingsOut<N> {
    /// The same with every tensor put through `f`.
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let ys = each(self.ys.iter().map(&mut *f))?;
        let low = match &self.low {
            Low::Stacked(h) => Low::Stacked(f(h)?),
            Low::Each(hs) => Low::Each(each(hs.iter().map(|h| h.as_ref().map(&mut *f).transpose()))?),
        };
        Ok(Self { ys, low })
    }
}

impl<const N: usize> Siblings<'_, N> {
    /// `y = x Wᵀ + b + Δy` of each.
    pub fn forward(&self, x_bli: &Tensor) -> Result<SiblingsOut<N>> {
        let Some((stack, loras)) = self.stack()? else {
            let outs = each(self.sites.iter().map(|site| site.forward(x_bli)))?;
            let low = Low::Each(outs.each_ref().map(|out| out.h.clone()));
            return Ok(SiblingsOut { ys: outs.map(|out| out.y), low });
        };
        let (exec, out) = (self.sites[0].exec, self.sites[0].exec.compute());
        let args = LinearArgs { x: x_bli, weight_oi: &stack.down_ri, bias_o: None, base: None, out };
        // With alpha = rank, as in the templates, there is nothing to scale.
        let h_blr = exec.scaled(exec.run::<Linear>(&args)?, loras[0].scale)?;
        let rounded = self.sites[0].frozen.rounded(exec, x_bli)?;
        let ys = each(self.sites.iter().zip(&stack.ups_or).zip(stack.parts()).map(|((site, up_or), (at, r))| {
            let args = LinearArgs { x: &h_blr.narrow(2, at, r)?, weight_oi: up_or, bias_o: None, base: None, out };
            let delta = exec.run::<Linear>(&args)?;
            site.frozen.forward_rounded(exec, x_bli, rounded.as_ref(), Some(delta), out)
        }))?;
        Ok(SiblingsOut { ys, low: Low::Stacked(h_blr) })
    }

    /// `dx`, the sum over all of them, where it is wanted; the adapters' gradients go to the sink (`+=` there).
    pub fn backward(
        &self,
        x_bli: &Tensor,
        low: Low<N>,
        dys_blo: [Tensor; N],
        need_dx: bool,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let h_blr = match low {
            Low::Stacked(h_blr) => h_blr,
            Low::Each(hs) => return self.backward_each(x_bli, hs, dys_blo, need_dx, sink),
        };
        let Some((stack, loras)) = self.stack()? else {
            return Err(Error::Invalid { model: "linear", what: "adapters changed between the passes".into() });
        };
        let (exec, out) = (self.sites[0].exec, self.sites[0].exec.compute());
        for (((site, lora), dy), (at, r)) in self.sites.iter().zip(loras).zip(&dys_blo).zip(stack.parts()) {
            let h_blr = h_blr.narrow(2, at, r)?;
            let dup_or = exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: &h_blr, dy })?;
            sink.add(site.name()?, "lora_up.weight", &dup_or.narrow(1, 0, lora.down.dim(0)?)?)?;
        }
        drop(h_blr);
        let args = LinearStackBackwardArgs { dys: &dys_blo.each_ref(), ups_or: &stack.ups_or };
        let dh_blr = exec.scaled(exec.run::<LinearStackBackward>(&args)?, loras[0].scale)?;
        let ddown_ri = exec.run::<LinearWeightGrad>(&LinearWeightGradArgs { x: x_bli, dy: &dh_blr })?;
        for ((site, lora), (at, _)) in self.sites.iter().zip(loras).zip(stack.parts()) {
            sink.add(site.name()?, "lora_down.weight", &ddown_ri.narrow(0, at, lora.down.dim(0)?)?)?;
        }
        if !need_dx {
            return Ok(None);
        }
        let args = LinearBackwardArgs { dy: &dh_blr, weight_oi: &stack.down_ri, base: None, out };
        let mut dx_bli = exec.run::<LinearBackward>(&args)?;
        for (site, dy_blo) in self.sites.iter().zip(dys_blo) {
            dx_bli = site.frozen.backward(exec, &dy_blo, Some(dx_bli), out)?;
        }
        Ok(Some(dx_bli))
    }

    fn backward_each(
        &self,
        x_bli: &Tensor,
        hs: [Option<Tensor>; N],
        dys_blo: [Tensor; N],
        need_dx: bool,
        sink: &mut dyn GradSink,
    ) -> Result<Option<Tensor>> {
        let mut dx_bli: Option<Tensor> = None;
        for ((site, h), dy_blo) in self.sites.iter().zip(hs).zip(dys_blo) {
            if !need_dx {
                site.backward_params(x_bli, h.as_ref(), &dy_blo, sink)?;
                continue;
            }
            dx_bli = Some(site.backward(x_bli, h.as_ref(), &dy_blo, dx_bli, sink)?);
        }
        Ok(dx_bli)
    }

    /// The LoRAs side by side, if that is what all adapters here are: one scale, and no mask on their activations.
    fn stack(&self) -> Result<Option<(Stack, [&Lora; N])>> {
        let loras: Vec<_> = self.sites.iter().map_while(|site| site.adapter.as_ref()?.plain_lora()).collect();
        let Ok(loras) = <[&Lora; N]>::try_from(loras) else { return Ok(None) };
        if loras.iter().any(|lora| lora.scale != loras[0].scale) {
            return Ok(None);
        }
        let pairs = loras.map(|lora| (&lora.down, &lora.up));
        Ok(Some((Stack::new(self.sites[0].exec, &pairs)?, loras)))
    }
}

/// As many results as there are siblings.
fn each<T, const N: usize>(results: impl Iterator<Item = Result<T>>) -> Result<[T; N]> {
    let all = results.collect::<Result<Vec<_>>>()?;
    let lost = |_| Error::Invalid { model: "linear", what: format!("not every one of {N} siblings answered") };
    all.try_into().map_err(lost)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device, Tensor};
    use wan_kernels::philox::{stream, Philox};
    use wan_kernels::Exec;

    use super::*;
    use crate::adapter::{Active, Adapter, Adapters, Dropout, Lora};
    use crate::linear::{Frozen, Weight};

    fn normal(seed: u64, shape: &[usize]) -> Tensor {
        Philox::new(seed, stream::INIT, 0, 0).normal(shape, &Device::Cpu).unwrap()
    }

    /// LoRAs by site name; those of `masked` have a mask of ones, which changes nothing but the way taken.
    struct Loras {
        all: BTreeMap<String, Adapter>,
        masked: bool,
    }

    impl Loras {
        fn new(sites: &[(&str, usize, f64)], masked: bool) -> Self {
            let lora = |seed: usize, (site, rank, scale): &(&str, usize, f64)| {
                let seed = 10 * seed as u64;
                let (down, up) = (normal(seed + 1, &[*rank, 12]), normal(seed + 2, &[8, *rank]));
                (site.to_string(), Adapter::Lora(Lora { down, up, scale: *scale }))
            };
            Self { all: sites.iter().enumerate().map(|(seed, site)| lora(seed, site)).collect(), masked }
        }
    }

    impl Adapters for Loras {
        fn get(&self, site: &str) -> Option<&Adapter> {
            self.all.get(site)
        }

        fn dropout(&self, site: &str, _batch: usize, _rows: usize) -> Result<Dropout> {
            let Some(Adapter::Lora(lora)) = self.get(site) else { return Ok(Dropout::default()) };
            let ones = Tensor::ones((1, 1, lora.down.dim(0)?), DType::F32, &Device::Cpu)?;
            Ok(Dropout { rank: self.masked.then_some(ones), ..Dropout::default() })
        }
    }

    #[derive(Default)]
    struct Sink(BTreeMap<String, Tensor>);

    impl GradSink for Sink {
        fn add(&mut self, site: &str, param: &'static str, grad: &Tensor) -> Result<()> {
            assert!(self.0.insert(format!("{site}.{param}"), grad.copy()?).is_none());
            Ok(())
        }
    }

    /// Outputs, `dx`, and all gradients of one pass through q, k and v.
    fn pass(adapters: &Loras, need_dx: bool) -> (bool, Vec<Tensor>, BTreeMap<String, Tensor>) {
        let exec = Exec::cpu();
        let names = ["q", "k", "v"];
        let frozen: Vec<_> = (0..3)
            .map(|j| Frozen::new(Weight::Dense(normal(100 + j, &[8, 12])), Some(normal(110 + j, &[8]))).unwrap())
            .collect();
        let x = normal(120, &[2, 5, 12]);
        let site =
            |j: usize| Site { exec: &exec, frozen: &frozen[j], adapter: Active::find(adapters, names[j], &x).unwrap() };
        let siblings = Siblings { sites: [site(0), site(1), site(2)] };
        let SiblingsOut { ys, low } = siblings.forward(&x).unwrap();
        let stacked = matches!(low, Low::Stacked(_));
        let dys = [0, 1, 2].map(|j| normal(130 + j, &[2, 5, 8]));
        let mut sink = Sink::default();
        let dx = siblings.backward(&x, low, dys, need_dx, &mut sink).unwrap();
        assert_eq!(dx.is_some(), need_dx);
        (stacked, ys.into_iter().chain(dx).collect(), sink.0)
    }

    fn assert_close(got: &Tensor, want: &Tensor) {
        assert_eq!(got.dims(), want.dims());
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (got, want) in values(got).into_iter().zip(values(want)) {
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{got} {want}");
        }
    }

    #[test]
    fn side_by_side_is_one_after_the_other() {
        for need_dx in [true, false] {
            let sites = [("q", 3, 0.5), ("k", 4, 0.5), ("v", 2, 0.5)];
            let (stacked, outs, grads) = pass(&Loras::new(&sites, false), need_dx);
            let (alone, want_outs, want_grads) = pass(&Loras::new(&sites, true), need_dx);
            assert!(stacked && !alone);
            assert_eq!(grads.len(), 6);
            outs.iter().zip(&want_outs).for_each(|(got, want)| assert_close(got, want));
            assert!(grads.keys().eq(want_grads.keys()));
            grads.values().zip(want_grads.values()).for_each(|(got, want)| assert_close(got, want));
        }
    }

    #[test]
    fn other_scales_and_missing_adapters_work_alone() {
        let (stacked, _, grads) = pass(&Loras::new(&[("q", 3, 0.5), ("k", 3, 1.0), ("v", 3, 0.5)], false), true);
        assert!(!stacked && grads.len() == 6);
        let (stacked, _, grads) = pass(&Loras::new(&[("q", 3, 0.5), ("v", 3, 0.5)], false), true);
        assert!(!stacked && grads.len() == 4);
    }
}
