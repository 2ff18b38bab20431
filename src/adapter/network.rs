//! `--network_module`, `--network_dim`, `--network_alpha`, `--network_dropout`, `--network_args` as one checked value.

use wan_models::adapter::{AdapterSpec, Kind};

use super::target::Patterns;
use crate::error::UserError;
use crate::kwargs::KwArgs;

/// The network that is trained.
#[derive(Debug, Clone)]
pub struct NetworkSpec {
    pub adapter: AdapterSpec,
    pub patterns: Patterns,
    pub dropout: DropoutSpec,
    /// LoRA+: what multiplies the learning rate of `lora_up`.
    pub loraplus_lr_ratio: Option<f64>,
    /// Settings that were accepted and change nothing, for the user to read once.
    pub notes: Vec<String>,
}

/// Probabilities of dropout; 0 is off.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DropoutSpec {
    /// Of an element of `down(x)` (LoRA only).
    pub neuron: f64,
    /// Of a rank per sample (LoRA), or of an output row (LoHa, LoKr).
    pub rank: f64,
    /// Of a whole site in a step.
    pub module: f64,
}

impl DropoutSpec {
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

/// What the options say, as typed.
#[derive(Debug, Clone, Default)]
pub struct NetworkOptions<'a> {
    pub module: &'a str,
    pub dim: u64,
    pub alpha: f64,
    pub dropout: Option<f64>,
    pub args: &'a [String],
}

impl NetworkSpec {
    pub fn parse(o: &NetworkOptions) -> Result<Self, UserError> {
        let mut args = KwArgs::parse("network_args", o.args)?;
        let mut notes = Vec::new();
        let kind = match o.module.rsplit('.').next().unwrap_or_default() {
            "lora_wan" | "lora" => Kind::Lora,
            "loha" => Kind::Loha,
            "lokr" => Kind::Lokr { factor: args.take_f64("factor")?.unwrap_or(-1.0) as i64 },
            _ => {
                return Err(UserError::usage(format!("--network_module {} is not supported", o.module))
                    .hint("use networks.lora_wan, networks.loha or networks.lokr"))
            }
        };
        if o.dim == 0 {
            return Err(UserError::usage("--network_dim must be at least 1"));
        }
        if !o.alpha.is_finite() || o.alpha < 0.0 {
            return Err(UserError::usage(format!("--network_alpha {} must not be negative", o.alpha)));
        }
        let patterns = Patterns::new(&args.take_strings("exclude_patterns")?, &args.take_strings("include_patterns")?)?;
        let mut share = |key: &'static str| -> Result<f64, UserError> {
            let p = args.take_f64(key)?.unwrap_or(0.0);
            probability(&format!("--network_args {key}"), p)
        };
        let dropout = DropoutSpec {
            neuron: probability("--network_dropout", o.dropout.unwrap_or(0.0))?,
            rank: share("rank_dropout")?,
            module: share("module_dropout")?,
        };
        let mut loraplus_lr_ratio = args.take_f64("loraplus_lr_ratio")?.filter(|r| *r != 1.0);
        if loraplus_lr_ratio.is_some_and(|r| !(r.is_finite() && r > 0.0)) {
            return Err(args.error("loraplus_lr_ratio", "must be positive"));
        }
        if kind != Kind::Lora {
            if dropout.neuron > 0.0 {
                return Err(UserError::usage("--network_dropout works with LoRA only")
                    .hint("use --network_args rank_dropout=… or module_dropout=…"));
            }
            if loraplus_lr_ratio.take().is_some() {
                notes.push("loraplus_lr_ratio works with LoRA only: it is ignored".into());
            }
        }
        for key in ["conv_dim", "conv_alpha"] {
            if args.take(key).is_some() {
                notes.push(format!("{key}: the blocks of this model hold no convolutions, so it changes nothing"));
            }
        }
        let _ = args.take_bool("verbose")?;
        args.finish()?;
        let adapter = AdapterSpec { kind, rank: o.dim as usize, alpha: o.alpha };
        Ok(Self { adapter, patterns, dropout, loraplus_lr_ratio, notes })
    }

    /// A LoRA on every linear of the blocks.
    pub fn lora(rank: usize, alpha: f64) -> Self {
        Self {
            adapter: AdapterSpec { kind: Kind::Lora, rank, alpha },
            patterns: Patterns::default(),
            dropout: DropoutSpec::default(),
            loraplus_lr_ratio: None,
            notes: Vec::new(),
        }
    }

    /// `lora`, `loha` or `lokr`.
    pub fn kind_name(&self) -> &'static str {
        match self.adapter.kind {
            Kind::Lora => "lora",
            Kind::Loha => "loha",
            Kind::Lokr { .. } => "lokr",
        }
    }

    /// The scale's alpha as it works: 0 means the rank.
    pub fn alpha(&self) -> f64 {
        match self.adapter.alpha {
            0.0 => self.adapter.rank as f64,
            alpha => alpha,
        }
    }
}

fn probability(what: &str, p: f64) -> Result<f64, UserError> {
    match (0.0..1.0).contains(&p) {
        true => Ok(p),
        false => Err(UserError::usage(format!("{what} {p} must lie in 0..1"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(module: &str, args: &[&str]) -> Result<NetworkSpec, UserError> {
        let args: Vec<String> = args.iter().map(|s| s.to_string()).collect();
        NetworkSpec::parse(&NetworkOptions { module, dim: 8, alpha: 4.0, dropout: None, args: &args })
    }

    #[test]
    fn arguments_of_existing_recipes_are_read() {
        let spec = parse(
            "networks.lora_wan",
            &["loraplus_lr_ratio=4", "exclude_patterns=['.*img.*']", "rank_dropout=0.1", "verbose=True", "conv_dim=4"],
        )
        .unwrap();
        assert_eq!(spec.loraplus_lr_ratio, Some(4.0));
        assert_eq!(spec.dropout, DropoutSpec { neuron: 0.0, rank: 0.1, module: 0.0 });
        assert_eq!(spec.notes.len(), 1);
        assert!(!spec.patterns.selects("blocks.0.cross_attn.k_img"));
        assert_eq!(parse("networks.lokr", &["factor=8"]).unwrap().adapter.kind, Kind::Lokr { factor: 8 });
    }

    #[test]
    fn mistakes_are_named() {
        let text = |module, args: &[&str]| parse(module, args).unwrap_err().to_string();
        assert!(text("networks.lora_wan", &["loraplus_ratio=4"]).contains("did you mean `loraplus_lr_ratio`"));
        assert!(text("lycoris.kohya", &[]).contains("networks.lokr"));
        assert!(text("networks.lora_wan", &["rank_dropout=1.0"]).contains("0..1"));
        assert!(text("networks.lora_wan", &["exclude_patterns=['(']"]).contains("`(`"));
        assert!(text("networks.lora_wan", &["loraplus_lr_ratio=0"]).contains("positive"));
        assert!(text("networks.lora_wan", &["factor=8"]).contains("factor"));
        let zero = NetworkOptions { module: "lora", dim: 0, alpha: 1.0, ..Default::default() };
        assert!(NetworkSpec::parse(&zero).is_err());
    }
}
