# make demo   installs what is missing, builds, trains the demo from pictures to a LoRA
# make test   formatting, lints and the whole test suite
# make cuda   the program for NVIDIA cards (sm_80 and later); brings its own CUDA compiler when there is none
# Both work on a fresh Debian/Ubuntu machine that has Rust (https://rustup.rs).

CARGO ?= cargo
DEMO_DIR ?= demo
# libav* and clang (for the FFmpeg bindings), pkg-config to find them.
PACKAGES = build-essential pkg-config clang libclang-dev libavcodec-dev libavformat-dev libavutil-dev libavfilter-dev \
           libavdevice-dev libswscale-dev libswresample-dev

.PHONY: all deps build demo test cuda test-cuda bench clean
all: build

# Asks the package manager only when something is missing.
deps:
	@command -v $(CARGO) >/dev/null || { echo "error: cargo is missing"; echo "hint: install Rust from https://rustup.rs"; exit 1; }
	@if ! command -v pkg-config >/dev/null || ! command -v clang >/dev/null || ! command -v cc >/dev/null \
	   || ! pkg-config --exists libavcodec libavformat libavutil libavfilter libavdevice libswscale libswresample; then \
	  if command -v apt-get >/dev/null; then \
	    SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    $$SUDO apt-get update -q && $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -q $(PACKAGES); \
	  else \
	    echo "error: the FFmpeg development libraries or clang are missing"; \
	    echo "hint: install the equivalents of: $(PACKAGES)"; exit 1; \
	  fi; \
	fi

build: deps
	$(CARGO) build --release --locked

demo: build
	$$($(CARGO) metadata --format-version 1 --no-deps --locked | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/wan-train \
	  --template demo --base_dir $(DEMO_DIR) \
	  --sample_prompts '{base_dir}/datasets/demo/prompts.txt' --sample_every_n_epochs 25

# One feature set for lints, tests and the binary they run: candle is compiled once.
test: deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test --workspace --locked

# FEATURES="--no-default-features --features cuda" leaves FFmpeg out, for machines that train on cached latents only.
FEATURES ?= --features cuda
cuda: deps
	eval "$$(kernels/toolkit.sh)" && $(CARGO) build --release --locked $(FEATURES)

# Needs a card: the program's tests, which take it where there is one.
test-cuda: deps
	eval "$$(kernels/toolkit.sh)" && $(CARGO) test --locked --features cuda --test main program::

bench: deps
	$(CARGO) bench --locked

clean:
	rm -rf $(DEMO_DIR)
