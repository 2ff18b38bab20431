//! The price of a training step in bytes, closed forms only.
//!
//! L tokens, M text rows (and I image rows) of a batch; d width, f feed-forward width, n heads, r rank; c bytes of the
//! compute dtype, s bytes of the residual stream. What a policy keeps of a block (see the block's two passes):
//!
//! | policy | kept beside the input `L·d·s` |
//! |---|---|
//! | recompute | nothing |
//! | keep attention | `L·d·c` and its log-sum-exp `4·n·L` |
//! | keep all | that, the outputs of q, k, v, o, cross q, cross o (`6·L·d·c`), cross-attention (`L·d·c + 4·n·L`, and keys and values `2·M·d·c`, for text and again for image rows), the first feed-forward product (`L·f·c`), and each LoRA's `x·Aᵀ` |

use wan_kernels::int8;
use wan_kernels::linear::eight;
use wan_models::adapter::{AdapterSpec, Kind};
use wan_models::arch::{Site, WanArch};
use wan_models::linear::Products;
use wan_models::wan::{BlockPlan, Home, SavePolicy};

/// Where a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Everything is host memory.
    Cpu,
    Cuda,
}

/// How the linears of the blocks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightForm {
    /// Bytes an element: 4 or 2.
    Dense(u64),
    /// One byte an element and a scale of this many bytes per block of 64 inputs (per row where they do not divide).
    Fp8Scaled { scale_bytes: u64 },
    /// One byte an element and an fp32 scale an output; what is not in multiples of 16, as `Fp8Scaled`.
    Fp8Rows { scale_bytes: u64 },
    /// One byte an element, no scales.
    Fp8Cast,
    /// One byte an element and two fp32 scales an output; what is not in blocks of 64, `otherwise` bytes an element.
    Int8 { otherwise: u64 },
}

/// Bytes of the optimizer's moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moments {
    F32,
    /// Codes in blocks of 256 with two fp32 scales; tensors below 4096 elements in fp32.
    Blocks8bit,
    /// One fp32 number a row and a column of each matrix; with a first moment one a weight besides.
    Factored {
        first: bool,
    },
}

/// Everything the arithmetic depends on.
#[derive(Debug, Clone)]
pub struct Job {
    pub arch: WanArch,
    /// Frozen models of this architecture: 2 where one adapter is trained over two experts.
    pub models: u64,
    pub target: Target,
    pub weights: WeightForm,
    /// What the linears of the blocks are multiplied on: a matter of time alone.
    pub products: Products,
    /// Self-attention of forward in 8 bits.
    pub fast_attention: bool,
    /// Bytes of an element outside the blocks' matrices (embeddings, head, norms, biases).
    pub rest_bytes: u64,
    /// Bytes of the compute dtype.
    pub compute_bytes: u64,
    /// Bytes of the residual stream.
    pub stream_bytes: u64,
    /// Latent frames, rows, columns of the largest bucket.
    pub latent: [u64; 3],
    pub batch: u64,
    pub adapter: AdapterSpec,
    /// Linears with an adapter.
    pub sites: Vec<Site>,
    pub moments: Moments,
}

/// Who is where: the choice that a plan makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrangement {
    pub blocks_to_swap: u64,
    pub ring_size: u64,
    /// One per block.
    pub saving: Vec<BlockPlan>,
}

impl Arrangement {
    /// All blocks in place, all with one policy.
    pub fn uniform(job: &Job, keep: SavePolicy, home: Home) -> Self {
        Self { blocks_to_swap: 0, ring_size: 2, saving: vec![BlockPlan { keep, home }; job.arch.num_layers] }
    }
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub what: &'static str,
    pub device: u64,
    pub host: u64,
}

/// The table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    pub rows: Vec<Row>,
    /// Device memory that lies between tensors: see [`gaps`].
    pub gaps: u64,
}

/// What a card's allocator holds beyond `tensors` bytes in tensors: pieces between them that fit nothing. Measured on
/// H200s as the pools' peak over that of the tensors: 1.0 to 1.3 GiB at 10, 0.9 to 1.6 at 21, 2.0 to 2.8 at 125 to 134.
/// This is about their middle: the most was 3.6 % above the plan's total. Longer runs scatter more; see
/// `wan_kernels::Exec::end_of_step`.
fn gaps(tensors: u64) -> u64 {
    (13 << 26) + tensors / 72
}

impl Memory {
    /// Bytes in tensors on the device.
    pub fn device(&self) -> u64 {
        self.rows.iter().map(|r| r.device).sum()
    }

    /// Device memory that the process holds for them, gaps included: what a budget bounds.
    pub fn held(&self) -> u64 {
        self.device() + self.gaps
    }

    pub fn host(&self) -> u64 {
        self.rows.iter().map(|r| r.host).sum()
    }

    pub fn row(&self, what: &str) -> Option<&Row> {
        self.rows.iter().find(|r| r.what == what)
    }
}

/// Scratch of the attention reference: score tiles are split above this size.
const ATTENTION_TILE: u64 = 256 << 20;
/// Copies of a tile alive at once in the reference's backward.
const TILES: u64 = 4;
/// Workspace of the matrix library.
const GEMM_WORKSPACE: u64 = 32 << 20;
/// Ranks are filled up to a multiple of this on a card.
const RANK: u64 = 16;

impl Job {
    /// Tokens of a batch.
    pub fn tokens(&self) -> u64 {
        let [f, h, w] = self.latent;
        let [pf, ph, pw] = self.arch.patch.map(|p| p as u64);
        self.batch * (f / pf) * (h / ph) * (w / pw)
    }

    fn text_rows(&self) -> u64 {
        self.batch * self.arch.text_len as u64
    }

    fn image_rows(&self) -> u64 {
        self.arch.clip.map_or(0, |c| self.batch * c.rows() as u64)
    }

    /// Weights and scales of the linears of one block.
    pub fn block_linear_bytes(&self) -> u64 {
        let matrix = |site: &Site| {
            let (o, i) = (site.out_features as u64, site.in_features as u64);
            match self.weights {
                WeightForm::Dense(bytes) => o * i * bytes,
                WeightForm::Fp8Cast => o * i,
                WeightForm::Int8 { .. } if int8::takes([site.out_features, site.in_features]) => o * i + 8 * o,
                WeightForm::Int8 { otherwise } => o * i * otherwise,
                WeightForm::Fp8Rows { .. } if eight::takes([site.out_features, site.in_features]) => o * i + 4 * o,
                WeightForm::Fp8Scaled { scale_bytes } | WeightForm::Fp8Rows { scale_bytes } => {
                    let scales = if i % 64 == 0 { i / 64 } else { 1 };
                    o * i + o * scales * scale_bytes
                }
            }
        };
        self.arch.block_sites(0).iter().map(matrix).sum()
    }

    /// Biases, norms and modulation of one block.
    fn block_small_bytes(&self) -> u64 {
        let d = self.arch.dim as u64;
        let biases: u64 = self.arch.block_sites(0).iter().map(|s| s.out_features as u64).sum();
        let norms = 4 * d + 2 * d + if self.arch.clip.is_some() { d } else { 0 };
        (biases + norms + 6 * d) * self.rest_bytes
    }

    /// Embeddings and head.
    fn outer_bytes(&self) -> u64 {
        let a = &self.arch;
        let (d, text, freq) = (a.dim as u64, a.text_dim as u64, a.freq_dim as u64);
        let patch = d * a.patch_in() as u64 + d;
        let text = d * text + d + d * d + d;
        let time = d * freq + d + d * d + d + 6 * d * d + 6 * d;
        let head = d * a.patch_out() as u64 + a.patch_out() as u64 + 2 * d;
        let image = a.clip.map_or(0, |c| {
            let w = c.dim as u64;
            let position = if c.images == 2 { c.rows() as u64 * w } else { 0 };
            position + 2 * w + w * w + w + w * d + d + 2 * d
        });
        (patch + text + time + head + image) * self.rest_bytes
    }

    /// Trainable elements.
    pub fn trainable(&self) -> u64 {
        let of = |s: &Site| self.adapter.layout(s.out_features, s.in_features).params;
        self.sites.iter().flat_map(of).map(|p| (p.shape[0] * p.shape[1]) as u64).sum()
    }

    /// Bytes of the optimizer's moments.
    pub fn moment_bytes(&self) -> u64 {
        const BLOCK: u64 = 256;
        const SMALL: u64 = 4096;
        match self.moments {
            Moments::F32 => 8 * self.trainable(),
            Moments::Factored { first } => {
                let of = |s: &Site| self.adapter.layout(s.out_features, s.in_features).params;
                let means: u64 = self.sites.iter().flat_map(of).map(|p| (p.shape[0] + p.shape[1]) as u64).sum();
                4 * means + if first { 4 * self.trainable() } else { 0 }
            }
            Moments::Blocks8bit => {
                let of = |s: &Site| self.adapter.layout(s.out_features, s.in_features).params;
                let bytes = |elements: u64| match elements < SMALL {
                    true => 8 * elements,
                    false => 2 * elements + 8 * elements.div_ceil(BLOCK),
                };
                self.sites.iter().flat_map(of).map(|p| bytes((p.shape[0] * p.shape[1]) as u64)).sum()
            }
        }
    }

    /// Rows a LoRA's low-rank activations take in one block: `x·Aᵀ` of every site, in elements.
    fn low_rank_elements(&self) -> u64 {
        if self.adapter.kind != Kind::Lora {
            return 0;
        }
        let rows = |name: &str| match name {
            n if n.ends_with("cross_attn.k") || n.ends_with("cross_attn.v") => self.text_rows(),
            n if n.ends_with("_img") => self.image_rows(),
            _ => self.tokens(),
        };
        let of_first = self.sites.iter().filter(|s| s.name.starts_with("blocks.0."));
        let rank = match self.target {
            Target::Cpu => self.adapter.rank as u64,
            Target::Cuda => (self.adapter.rank as u64).next_multiple_of(RANK),
        };
        of_first.map(|s| rows(&s.name) * rank).sum()
    }

    /// What one block keeps between the passes.
    pub fn saved_bytes(&self, keep: SavePolicy) -> u64 {
        let (d, n, f) = (self.arch.dim as u64, self.arch.num_heads as u64, self.arch.ffn_dim as u64);
        let (l, c) = (self.tokens(), self.compute_bytes);
        let input = l * d * self.stream_bytes;
        let attention = l * d * c + 4 * n * l;
        match keep {
            SavePolicy::Recompute => input,
            SavePolicy::KeepAttention => input + attention,
            SavePolicy::KeepAll => {
                let cross = |rows: u64| if rows == 0 { 0 } else { attention + 2 * rows * d * c };
                let products = 6 * l * d * c + l * f * c + self.low_rank_elements() * c;
                input + attention + cross(self.text_rows()) + cross(self.image_rows()) + products
            }
        }
    }

    /// The most that one block's passes take beside what is saved on the device; `away`: this block's saved tensors
    /// and the next one's come back from host memory for it. The widths of the tensors alive at the two widest moments
    /// of backward (in `L` rows; forward is below both):
    ///
    /// | | feed-forward part | attention's backward |
    /// |---|---|---|
    /// | streams | x2, dout | dx1 |
    /// | compute | GELU, its gradient, ffn.2's gradient | norm1, q and k rotated, do, dq, dk, dv, and fp32 dq |
    /// | not kept all: | ffn.0, o, cross q, cross-attention | q, k, v |
    /// | recompute also: | attention, q, k, v | attention |
    fn working_bytes(&self, keep: SavePolicy, away: bool) -> u64 {
        let (d, f, n) = (self.arch.dim as u64, self.arch.ffn_dim as u64, self.arch.num_heads as u64);
        let (l, c, s) = (self.tokens(), self.compute_bytes, self.stream_bytes);
        let contexts = if self.image_rows() > 0 { 2 } else { 1 };
        let sums = 4 * n;
        let mut feed_forward = 2 * d * s + d * c + 2 * f * c;
        let mut attention = d * s + 7 * d * c + 4 * d + sums;
        // What this block had saved and has given back by the time of attention's backward.
        let mut gone = 0;
        let later = 3 * d * c;
        match keep {
            SavePolicy::KeepAll => gone = f * c + (3 + contexts) * d * c,
            SavePolicy::KeepAttention => {
                feed_forward += f * c + (2 + contexts) * d * c + contexts * sums;
                attention += later;
            }
            SavePolicy::Recompute => {
                feed_forward += f * c + (2 + contexts) * d * c + contexts * sums + later + d * c + sums;
                attention += later + d * c + sums;
            }
        }
        let (slot, low_rank) = (self.saved_bytes(keep), self.low_rank_elements() * c);
        let low_rank = if keep == SavePolicy::KeepAll { 0 } else { low_rank };
        match away {
            // What is counted as saved shrinks by what is gone, of this block only.
            false => low_rank + l * feed_forward.max(attention.saturating_sub(gone)),
            true => low_rank + (slot + l * feed_forward).max(2 * slot - l * gone + l * attention),
        }
    }

    /// The most that a preview takes beside what stays between steps. Alive at the two widest moments of a forward pass (in
    /// `L` rows): three streams, ffn.0, GELU, ffn.2; or three streams, q, k, v, two of them rotated, attention's and o, which
    /// is more than cross-attention's part. Fast attention has codes of q, k and v in addition.
    pub fn preview_bytes(&self) -> u64 {
        let (d, f, n) = (self.arch.dim as u64, self.arch.ffn_dim as u64, self.arch.num_heads as u64);
        let (c, s) = (self.compute_bytes, self.stream_bytes);
        let codes = if self.fast_attention { 3 * d + 4 * n } else { 0 };
        let widest = (2 * f * c + d * c).max(7 * d * c + 4 * n + codes) + 3 * d * s;
        self.tokens() * widest + self.low_rank_elements() * c + self.scratch_bytes() + self.batch_bytes()
    }

    /// What single operations need beside their arguments and results.
    fn scratch_bytes(&self) -> u64 {
        let (d, n, l) = (self.arch.dim as u64, self.arch.num_heads as u64, self.tokens());
        let largest = self.arch.dim.max(self.arch.ffn_dim) as u64 * d;
        match self.target {
            // The reference widens a matrix to the compute dtype, and works on fp32 copies of queries, keys, values and
            // their gradients, a tile of scores at a time.
            Target::Cpu => {
                let widened = match self.weights {
                    WeightForm::Dense(bytes) if bytes == self.compute_bytes => 0,
                    _ => largest * self.compute_bytes,
                };
                let scores = (n * self.batch * (l / self.batch).pow(2) * 4).min(ATTENTION_TILE);
                widened + TILES * scores + 7 * l * d * 4
            }
            // One dequantised matrix, which dense weights do not need. With int8 the codes the other way round, and the
            // sums of some rows: on Hopper only, but counted on every card.
            Target::Cuda => {
                let widest = self.arch.dim.max(self.arch.ffn_dim) as u64;
                let tile = match self.weights {
                    WeightForm::Dense(_) => 0,
                    WeightForm::Int8 { .. } => largest + (l * widest * 4).min(int8::SUMS as u64),
                    _ => largest * self.compute_bytes,
                };
                tile + GEMM_WORKSPACE
            }
        }
    }

    /// Latents, noise, input, prediction and its gradient, text, embeddings of the first layer; two batches, since the
    /// next one is prefetched.
    fn batch_bytes(&self) -> u64 {
        let elements = self.batch * self.latent.iter().product::<u64>();
        let channels = 4 * self.arch.out_dim as u64 + self.arch.in_dim as u64;
        let text = self.text_rows() * self.arch.text_dim as u64;
        let rows = (self.text_rows() + self.image_rows()) * self.arch.dim as u64;
        2 * (elements * channels * 4 + text * 4) + rows * self.compute_bytes
    }
}

/// What does not depend on the arrangement, worked out once.
#[derive(Debug, Clone)]
pub struct Prices {
    cpu: bool,
    models: u64,
    layers: u64,
    rest: u64,
    block: u64,
    adapters: u64,
    gradients: u64,
    moments: u64,
    saved: [u64; 3],
    /// By policy: in place, or through host memory.
    working: [[u64; 2]; 3],
    scratch: u64,
    batches: u64,
}

impl Prices {
    pub fn new(job: &Job) -> Self {
        let (cpu, layers, trainable) = (job.target == Target::Cpu, job.arch.num_layers as u64, job.trainable());
        Self {
            cpu,
            models: job.models,
            layers,
            rest: job.outer_bytes() + layers * job.block_small_bytes(),
            block: job.block_linear_bytes(),
            adapters: 4 * trainable,
            gradients: 4 * trainable,
            moments: job.moment_bytes(),
            saved: POLICIES.map(|k| job.saved_bytes(k)),
            working: POLICIES.map(|k| [false, true].map(|away| job.working_bytes(k, away))),
            scratch: job.scratch_bytes(),
            batches: job.batch_bytes(),
        }
    }

    /// The table of an arrangement.
    pub fn of(&self, a: &Arrangement) -> Memory {
        let swapped = a.blocks_to_swap.min(self.layers);
        let slots = if swapped == 0 { 0 } else { a.ring_size.clamp(1, swapped) };
        let mut rows = Vec::with_capacity(10);
        // On the CPU host and device are one memory.
        let mut row = |what, device: u64, host: u64| match self.cpu {
            true => rows.push(Row { what, device: device + host, host: 0 }),
            false => rows.push(Row { what, device, host }),
        };
        let models: &[[&'static str; 3]] = if self.models == 1 { &[WEIGHTS] } else { &EXPERTS };
        for [rest, resident, streamed] in models {
            row(rest, self.rest, 0);
            row(resident, (self.layers - swapped) * self.block, 0);
            if swapped > 0 {
                row(streamed, slots * self.block, swapped * self.block);
            }
        }
        row("adapters", self.adapters, 0);
        row("gradients", self.gradients, 0);
        row("optimizer", self.moments, 0);
        // Backward begins at the last block with everything saved: a block needs its working set beside what is saved
        // of the blocks up to it.
        let (mut kept, mut away, mut peak) = (0, 0, 0);
        for plan in &a.saving {
            let policy = plan.keep as usize;
            let on_host = plan.home == Home::Host && !self.cpu;
            match on_host {
                false => kept += self.saved[policy],
                true => away += self.saved[policy],
            }
            peak = peak.max(kept + self.working[policy][usize::from(on_host)]);
        }
        row(OF_A_STEP[0], kept, away);
        row(OF_A_STEP[1], peak.saturating_sub(kept), 0);
        row(OF_A_STEP[2], self.scratch, 0);
        row("batches", self.batches, if self.cpu { 0 } else { self.batches });
        let tensors = rows.iter().map(|r| r.device).sum();
        Memory { rows, gaps: if self.cpu { 0 } else { gaps(tensors) } }
    }
}

/// The rows of what is gone between two steps.
pub const OF_A_STEP: [&str; 3] = ["saved activations", "working set of a block", "scratch"];
/// The rows of a model's weights.
const WEIGHTS: [&str; 3] = ["embeddings, head, norms, biases", "resident blocks", "streamed blocks"];
/// The same of two experts: both have their weights and their ring.
const EXPERTS: [[&str; 3]; 2] = [
    ["low: embeddings, norms, biases", "low: resident blocks", "low: streamed blocks"],
    ["high: embeddings, norms, biases", "high: resident blocks", "high: streamed blocks"],
];

/// In the order of their discriminants.
const POLICIES: [SavePolicy; 3] = [SavePolicy::Recompute, SavePolicy::KeepAttention, SavePolicy::KeepAll];

/// The table of an arrangement.
pub fn price(job: &Job, a: &Arrangement) -> Memory {
    Prices::new(job).of(a)
}
