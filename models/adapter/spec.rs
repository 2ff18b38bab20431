//! What an adapter of a given kind, rank and alpha consists of: parameter names, shapes, initial values, scale.

/// The family of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Lora,
    Loha,
    /// `factor` > 0 asks for that divisor; otherwise the most balanced pair is taken.
    Lokr {
        factor: i64,
    },
}

/// The settings that every site shares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterSpec {
    pub kind: Kind,
    pub rank: usize,
    /// 0 means "equal to the rank".
    pub alpha: f64,
}

/// How a parameter starts. Random values come from the caller's keyed generator.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in ±bound (kaiming with a = √5: bound = 1/√fan_in, fan_in = the parameter's second axis).
    Uniform(f64),
}

/// One trainable parameter of a site.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamSpec {
    /// Suffix of the site's name: `lora_down.weight`, `hada_w1_a`, `lokr_w2`, ...
    pub name: &'static str,
    pub shape: [usize; 2],
    pub init: Init,
}

/// A site's parameters and its factor.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// In the order in which they are created and saved.
    pub params: Vec<ParamSpec>,
    /// Factor on the adapter's output.
    pub scale: f64,
    /// The value of the stored `alpha` tensor; a LoKr with a full w2 stores its rank.
    pub alpha: f64,
    /// A LoKr with a full w2 stores alpha as an integer.
    pub alpha_is_integer: bool,
}

impl AdapterSpec {
    /// What this adapter is made of at a linear with these features.
    pub fn layout(&self, out_features: usize, in_features: usize) -> Layout {
        let (o, i, r) = (out_features, in_features, self.rank);
        let alpha = if self.alpha == 0.0 { r as f64 } else { self.alpha };
        let param = |name, shape, init| ParamSpec { name, shape, init };
        let kaiming = |shape: [usize; 2]| Init::Uniform(1.0 / (shape[1] as f64).sqrt());
        let layout = |params| Layout { params, scale: alpha / r as f64, alpha, alpha_is_integer: false };
        match self.kind {
            Kind::Lora => layout(vec![
                param("lora_down.weight", [r, i], kaiming([r, i])),
                param("lora_up.weight", [o, r], Init::Zeros),
            ]),
            Kind::Loha => layout(vec![
                param("hada_w1_a", [o, r], Init::Normal(0.1)),
                param("hada_w1_b", [r, i], Init::Normal(1.0)),
                param("hada_w2_a", [o, r], Init::Zeros),
                param("hada_w2_b", [r, i], Init::Normal(1.0)),
            ]),
            Kind::Lokr { factor } => {
                let ((o1, o2), (i1, i2)) = (factorization(o, factor), factorization(i, factor));
                let w1 = param("lokr_w1", [o1, i1], kaiming([o1, i1]));
                if r < o2.max(i2).div_ceil(2) {
                    return layout(vec![
                        w1,
                        param("lokr_w2_a", [o2, r], kaiming([o2, r])),
                        param("lokr_w2_b", [r, i2], Init::Zeros),
                    ]);
                }
                let params = vec![w1, param("lokr_w2", [o2, i2], Init::Zeros)];
                Layout { params, scale: 1.0, alpha: r as f64, alpha_is_integer: true }
            }
        }
    }
}

/// Splits a width into two factors, small one first: `factor` and its quotient where it divides, else the most
/// balanced pair of divisors whose smaller one is at most `factor` (any, if `factor` <= 0).
/// 5120 -> (64, 80), 13824 -> (108, 128), 1536 -> (32, 48), 8960 -> (80, 112).
pub fn factorization(width: usize, factor: i64) -> (usize, usize) {
    let limit = if factor > 0 { factor as usize } else { width };
    if factor > 0 && width.is_multiple_of(limit) {
        let (a, b) = (limit, width / limit);
        return (a.min(b), a.max(b));
    }
    let small = (1..=limit).take_while(|a| a * a <= width).filter(|&a| width.is_multiple_of(a)).last().unwrap_or(1);
    (small, width / small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_factor_as_recorded() {
        for (width, want) in [(5120, (64, 80)), (13824, (108, 128)), (1536, (32, 48)), (8960, (80, 112)), (97, (1, 97))]
        {
            assert_eq!(factorization(width, -1), want);
        }
        assert_eq!(factorization(5120, 16), (16, 320));
        assert_eq!(factorization(96, 48), (2, 48));
        assert_eq!(factorization(96, 7), (6, 16));
        assert_eq!(factorization(1, -1), (1, 1));
    }

    #[test]
    fn lokr_takes_the_full_matrix_when_the_rank_is_half_of_it() {
        let spec = |rank| AdapterSpec { kind: Kind::Lokr { factor: -1 }, rank, alpha: 2.0 };
        // 96 = 8 x 12: half of 12 is 6
        let low = spec(5).layout(96, 96);
        assert_eq!(low.params.len(), 3);
        assert_eq!((low.scale, low.alpha), (0.4, 2.0));
        let full = spec(6).layout(96, 96);
        assert_eq!(full.params[1].shape, [12, 12]);
        assert_eq!((full.scale, full.alpha, full.alpha_is_integer), (1.0, 6.0, true));
    }

    #[test]
    fn alpha_zero_means_the_rank() {
        let layout = AdapterSpec { kind: Kind::Lora, rank: 8, alpha: 0.0 }.layout(32, 16);
        assert_eq!((layout.scale, layout.alpha), (1.0, 8.0));
        assert_eq!(layout.params[0].init, Init::Uniform(0.25));
    }
}
