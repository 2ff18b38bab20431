//! One CUDA card at work: candle's device on a stream of its own, a second stream for copies, the kernels of this crate
//! loaded once, launches, timing, and what memory is in use.
//!
//! Compute is issued from one thread onto one stream, so tensors need no events of their own (cudarc's tracking is
//! turned off) and memory is freed and used again in stream order. The copy stream is ordered against it by explicit
//! events. Scratch buffers are reused for the same reason: whoever comes later on the stream runs later.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUfunction_attribute};
use candle_core::cuda_backend::cudarc::driver::{result, CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::{CudaDevice, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use super::blas::Blas;
pub use super::copy::Pinned;
use super::pool::Pools;
use super::stash::Stash;
pub use super::stash::{Staging, Unloading};
use crate::held::Held;
use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

mod card;
mod room;
pub use card::{Card, KernelsOf};
pub use room::Memory;

const NAME: &str = "gpu";
/// The first card with bf16 tensor cores and asynchronous copies to shared memory.
const OLDEST: (i32, i32) = (8, 0);

/// An op, and the events before and behind it.
type Timed = (&'static str, CudaEvent, CudaEvent);

/// A card; clones share it.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

/// Shared bytes that any launch may ask for.
const FREELY: usize = 40 << 10;

/// A kernel, and the shared bytes it may ask for.
type Loaded = (CudaFunction, usize);

struct Inner {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    leaving: Arc<CudaStream>,
    stash: Stash,
    card: Card,
    functions: Mutex<HashMap<(&'static str, String), Loaded>>,
    modules: Mutex<HashMap<&'static str, Arc<CudaModule>>>,
    blas: Blas,
    scratch: Mutex<HashMap<&'static str, CudaSlice<u8>>>,
    /// Behind everything that lies in them.
    pools: Pools,
    held: Mutex<Held>,
    profile: Mutex<Option<Vec<Timed>>>,
    /// A [`KernelsOf`].
    kernels_of: AtomicU8,
}

/// All cards in use, so that whoever holds only a tensor finds its card.
static CARDS: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

impl Gpu {
    /// Opens card `ordinal`. Errors (`Gpu`): a driver older than the CUDA of the build, no such card, a card older than
    /// sm_80.
    pub fn new(ordinal: usize) -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| error(NAME, format!("card {ordinal} cannot be opened: {e}"));
        crate::driver::check(card::driver_cuda(), card::BUILT_WITH).map_err(|what| failed(&what))?;
        // The context comes first: its error is about the driver, later ones about memory.
        let context = CudaContext::new(ordinal).map_err(|e| failed(&e))?;
        let card = Card::of(&context).map_err(|e| failed(&e))?;
        if card.capability < OLDEST {
            let (major, minor) = card.capability;
            return Err(error(NAME, format!("{} is sm_{major}{minor}; sm_80 or later is needed", card.name)));
        }
        // SAFETY: every tensor is made and used on the one compute stream; copies on the other stream are ordered by
        // explicit events (`copy_waits`, `compute_waits`).
        unsafe { context.disable_event_tracking() };
        let device = CudaDevice::new_with_stream(ordinal)?;
        let stream = device.cuda_stream();
        let copies = context.new_stream().map_err(|e| failed(&e))?;
        let leaving = context.new_stream().map_err(|e| failed(&e))?;
        let pools = Pools::new(&context).map_err(|e| failed(&e))?;
        let inner = Arc::new(Inner {
            blas: Blas::new(&stream)?,
            device,
            stream,
            copies,
            leaving,
            stash: Stash::default(),
            pools,
            held: Mutex::default(),
            card,
            functions: Mutex::default(),
            modules: Mutex::default(),
            scratch: Mutex::default(),
            profile: Mutex::new(None),
            kernels_of: AtomicU8::new(KernelsOf::ThisCard as u8),
        });
        let mut cards = lock(&CARDS);
        cards.retain(|c| c.strong_count() > 0);
        cards.push(Arc::downgrade(&inner));
        Ok(Gpu(inner))
    }

    /// The card that a tensor's device belongs to, if it was opened by [`Gpu::new`].
    pub fn of(device: &Device) -> Option<Self> {
        let Device::Cuda(device) = device else { return None };
        let cards = lock(&CARDS);
        cards.iter().filter_map(Weak::upgrade).find(|c| c.device.id() == device.id()).map(Gpu)
    }

    pub fn device(&self) -> Device {
        Device::Cuda(self.0.device.clone())
    }

    pub fn card(&self) -> &Card {
        &self.0.card
    }

    /// Waits until everything issued so far is done.
    pub fn synchronize(&self) -> Result<()> {
        self.0.stream.synchronize().map_err(|e| error(NAME, e.to_string()))
    }

    pub(crate) fn blas(&self) -> &Blas {
        &self.0.blas
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.0.stream
    }

    /// The stream for copies from device to host: the two directions of the bus work at the same time.
    pub(super) fn leaving_stream(&self) -> &Arc<CudaStream> {
        &self.0.leaving
    }

    pub(super) fn stash_of(&self) -> &Stash {
        &self.0.stash
    }

    /// The stream for copies from host to device.
    pub(crate) fn copies(&self) -> &Arc<CudaStream> {
        &self.0.copies
    }

    /// What is issued to the copy stream from now on waits for what was issued to the compute stream until now.
    pub(crate) fn copy_waits(&self) -> Result<()> {
        self.0.copies.join(&self.0.stream).map_err(|e| error(NAME, e.to_string()))
    }

    /// Waits (on the CPU) until the copy stream is done.
    pub(crate) fn finish_copies(&self) -> Result<()> {
        self.0.copies.synchronize().map_err(|e| error(NAME, e.to_string()))
    }

    /// Launches kernel `name` of file `file` (path without extension).
    ///
    /// The arguments are not checked: whoever calls has passed the op's gate and knows the kernel's parameters.
    pub(crate) fn launch(&self, file: &'static str, name: &str, shape: Launch, args: &[Arg]) -> Result<()> {
        let failed = |what: String| error(file, format!("{name}: {what}"));
        let function = self.function(file, name, shape.shared)?;
        let mut params: Vec<*mut c_void> = args.iter().map(|a| a.0.as_ptr() as *mut c_void).collect();
        self.0.stream.context().bind_to_thread().map_err(|e| failed(e.to_string()))?;
        // SAFETY: the parameters live until the call returns (the driver copies them), and every pointer among them is
        // to memory that is freed, if at all, later on the same stream.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                shape.grid,
                (shape.block, 1, 1),
                shape.shared as u32,
                self.0.stream.cu_stream(),
                &mut params,
            )
        }
        .map_err(|e| failed(format!("{e}, grid {:?} of {} threads", shape.grid, shape.block)))
    }

    fn function(&self, file: &'static str, name: &str, shared: usize) -> Result<CudaFunction> {
        let mut functions = lock(&self.0.functions);
        let key = (file, name.to_string());
        let known = functions.get(&key);
        if let Some((function, _)) = known.filter(|(_, most)| *most >= shared) {
            return Ok(function.clone());
        }
        let failed = |what: String| error(file, format!("{name}: {what}"));
        let function = match known {
            Some((function, _)) => function.clone(),
            None => self.module(file, failed)?.load_function(name).map_err(|e| failed(e.to_string()))?,
        };
        // 48 KiB hold a kernel's static memory as well.
        if shared > FREELY {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded, and stays so as long as its module.
            unsafe { result::function::set_function_attribute(function.cu_function(), attribute, shared as i32) }
                .map_err(|e| failed(e.to_string()))?;
        }
        functions.insert(key, (function.clone(), shared.max(FREELY)));
        Ok(function)
    }

    fn module(&self, file: &'static str, failed: impl Fn(String) -> crate::Error) -> Result<Arc<CudaModule>> {
        let mut modules = lock(&self.0.modules);
        Ok(match modules.get(file) {
            Some(module) => module.clone(),
            None => {
                let image = IMAGES.iter().find(|(path, _)| *path == file);
                let (_, image) = image.ok_or_else(|| failed("no such kernel file".into()))?;
                let ptx = candle_core::cuda_backend::cudarc::nvrtc::Ptx::from_binary(image.to_vec());
                let module = self.0.stream.context().load_module(ptx).map_err(|e| failed(e.to_string()))?;
                modules.insert(file, module.clone());
                module
            }
        })
    }

    /// From now on every op's time on the card is taken.
    pub fn start_profile(&self) {
        *lock(&self.0.profile) = Some(Vec::new());
    }

    /// (op, calls, milliseconds) since [`Gpu::start_profile`], longest first.
    pub fn finish_profile(&self) -> Result<Vec<(&'static str, usize, f64)>> {
        self.synchronize()?;
        let mut sums: HashMap<&'static str, (usize, f64)> = HashMap::new();
        for (name, start, end) in lock(&self.0.profile).take().unwrap_or_default() {
            let ms = start.elapsed_ms(&end).map_err(|e| error(NAME, e.to_string()))?;
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + 1, sum.1 + f64::from(ms));
        }
        let mut rows: Vec<_> = sums.into_iter().map(|(name, (calls, ms))| (name, calls, ms)).collect();
        rows.sort_by(|a, b| b.2.total_cmp(&a.2));
        Ok(rows)
    }

    /// Runs `body`, timed under `name` while a profile is taken.
    pub(crate) fn timed<T>(&self, name: &'static str, body: impl FnOnce() -> Result<T>) -> Result<T> {
        if lock(&self.0.profile).is_none() {
            return body();
        }
        let start = self.event()?;
        let out = body()?;
        let end = self.event()?;
        if let Some(rows) = lock(&self.0.profile).as_mut() {
            rows.push((name, start, end));
        }
        Ok(out)
    }

    /// A point in time on the compute stream; `a.elapsed_ms(&b)` waits for both.
    pub fn event(&self) -> Result<CudaEvent> {
        let with_time = sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.0.stream.record_event(Some(with_time)).map_err(|e| error(NAME, e.to_string()))
    }
}

/// Grid, threads of a block (one axis), dynamic shared bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub grid: (u32, u32, u32),
    pub block: u32,
    pub shared: usize,
}

impl Launch {
    /// Enough blocks of 256 threads for `n` items, `each` a thread.
    pub fn over(n: usize, each: usize) -> Self {
        Launch { grid: (n.div_ceil(256 * each) as u32, 1, 1), block: 256, shared: 0 }
    }

    pub fn blocks(grid: (usize, usize, usize), block: u32) -> Self {
        Launch { grid: (grid.0 as u32, grid.1 as u32, grid.2 as u32), block, shared: 0 }
    }
}

/// A kernel argument: the bytes of a scalar, a pointer or a small struct of them; the largest is a tensor map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arg([u64; Arg::LONGS]);

impl Arg {
    const LONGS: usize = 16;

    /// A struct of 64-bit values, in order.
    pub fn longs(longs: &[u64]) -> Self {
        let mut packed = [0u64; Arg::LONGS];
        packed[..longs.len()].copy_from_slice(longs);
        Arg(packed)
    }

    pub fn ptr(address: u64) -> Self {
        Arg::longs(&[address])
    }

    pub fn i32(v: usize) -> Self {
        debug_assert!(v <= i32::MAX as usize);
        Arg::longs(&[v as u64])
    }

    pub fn i64(v: usize) -> Self {
        Arg::longs(&[v as u64])
    }

    pub fn f32(v: f32) -> Self {
        Arg::longs(&[u64::from(v.to_bits())])
    }

    /// `wan::In` or `wan::Out`: a pointer and a dtype.
    pub fn tensor(t: &View) -> Self {
        Arg::longs(&[t.address, t.dtype_code()])
    }

    /// `wan::In` of an optional tensor: null where there is none.
    pub fn optional(t: Option<&View>) -> Self {
        t.map_or(Arg::longs(&[]), Arg::tensor)
    }

    /// A struct of 32-bit words, in order.
    pub fn words(words: &[u32]) -> Self {
        let mut packed = [0u64; Arg::LONGS];
        for (i, &word) in words.iter().enumerate() {
            packed[i / 2] |= u64::from(word) << (i % 2 * 32);
        }
        Arg(packed)
    }

    /// A struct of others, each with its 64-bit words.
    pub fn join(parts: &[(Arg, usize)]) -> Self {
        let mut packed = [0u64; Arg::LONGS];
        let words = parts.iter().flat_map(|(part, words)| &part.0[..*words]);
        packed.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        Arg(packed)
    }

    /// A struct of pointers followed by 32-bit words.
    pub fn pointers(pointers: &[u64], words: &[u32]) -> Self {
        let Arg(tail) = Arg::words(words);
        let mut packed = [0u64; Arg::LONGS];
        packed[..pointers.len()].copy_from_slice(pointers);
        packed[pointers.len()..].copy_from_slice(&tail[..Arg::LONGS - pointers.len()]);
        Arg(packed)
    }
}

/// A contiguous tensor on the card, aligned for 128-bit loads, and its address. It keeps the tensor alive until the
/// launch is issued; after that the stream's order does.
pub(crate) struct View {
    _tensor: Tensor,
    pub address: u64,
    pub dtype: DType,
}

impl View {
    /// `t` itself, or a copy of it where its layout or place does not suit.
    pub fn new(op: &'static str, t: &Tensor) -> Result<Self> {
        let tensor = t.contiguous()?;
        let address = tensor_address(op, &tensor)?;
        if address % 16 == 0 {
            return Ok(View { address, dtype: tensor.dtype(), _tensor: tensor });
        }
        let tensor = tensor.copy()?;
        Ok(View { address: tensor_address(op, &tensor)?, dtype: tensor.dtype(), _tensor: tensor })
    }

    /// The rows of a tensor [.., d] and the elements from one to the next: columns cut out of a wider tensor are read
    /// where they lie, if every row begins aligned.
    pub fn rows(op: &'static str, t: &Tensor) -> Result<(Self, Option<usize>)> {
        let (dims, strides) = (t.dims(), t.stride());
        let aligned = |elements: usize| (elements * t.dtype().size_in_bytes()).is_multiple_of(16);
        if let (false, [.., row, 1]) = (t.is_contiguous(), strides) {
            let even = (0..dims.len() - 2).all(|axis| strides[axis] == strides[axis + 1] * dims[axis + 1]);
            let address = element_address(op, t, t.layout().start_offset())?;
            if even && aligned(*row) && address % 16 == 0 {
                return Ok((View { address, dtype: t.dtype(), _tensor: t.clone() }, Some(*row)));
            }
        }
        Ok((View::new(op, t)?, None))
    }

    /// Whether `new` takes the tensor as it is.
    pub fn direct(op: &'static str, t: &Tensor) -> Result<bool> {
        Ok(t.is_contiguous() && tensor_address(op, t)? % 16 == 0)
    }

    /// `wan::In` or `wan::Out` of a part of the tensor that begins at `address`.
    pub fn moved(&self, address: u64) -> Arg {
        Arg::longs(&[address, self.dtype_code()])
    }

    fn dtype_code(&self) -> u64 {
        match self.dtype {
            DType::BF16 => 1,
            DType::F16 => 2,
            _ => 0,
        }
    }
}

/// Where a contiguous tensor begins in the card's memory.
pub(crate) fn tensor_address(op: &'static str, t: &Tensor) -> Result<u64> {
    let Some((start, _)) = t.layout().contiguous_offsets() else {
        return Err(error(op, format!("a tensor {:?} is not contiguous", t.shape())));
    };
    element_address(op, t, start)
}

/// Where the element `start` of a tensor's memory is.
fn element_address(op: &'static str, t: &Tensor, start: usize) -> Result<u64> {
    let (storage, _) = t.storage_and_layout();
    let Storage::Cuda(cuda) = &*storage else {
        return Err(error(op, format!("a tensor {:?} is not on the card", t.shape())));
    };
    let stream = cuda.device.cuda_stream();
    let base = match t.dtype() {
        DType::F32 => address(cuda.as_cuda_slice::<f32>()?, &stream),
        DType::BF16 => address(cuda.as_cuda_slice::<bf16>()?, &stream),
        DType::F16 => address(cuda.as_cuda_slice::<f16>()?, &stream),
        DType::U8 => address(cuda.as_cuda_slice::<u8>()?, &stream),
        DType::U32 => address(cuda.as_cuda_slice::<u32>()?, &stream),
        DType::F64 => address(cuda.as_cuda_slice::<f64>()?, &stream),
        got => return Err(Error::Dtype { op, tensor: "argument", got, want: "a dtype that kernels read" }),
    };
    Ok(base + (start * t.dtype().size_in_bytes()) as u64)
}

fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

pub(crate) fn error(op: &'static str, what: String) -> Error {
    Error::Gpu { op, what }
}

/// A panic elsewhere leaves nothing half-done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
