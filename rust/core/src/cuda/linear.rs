//! `y = x @ W^T + bias` for few tokens. For the gradient to x, and with very many tokens, unpacking parts of the weight and
//! multiplying with a library is the way: the caller does that.

use super::Queue;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::plan::{Operation, Problem, Share, plan};
use super::weight::{DeviceBuffer, DeviceFloats, DeviceWeight, number};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// The most tokens that kernels multiply without unpacking the weight.
pub const MAX_TOKENS: usize = 16;

/// The most of them at once in float32, of which each takes two columns of the tensor cores' operand.
const MAX_FLOAT32_TOKENS: usize = 8;

/// Rows of activations: `tokens` rows of a known width, `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct DeviceActivations {
    /// The elements, from the first of the first row to the last of the last.
    pub values: DeviceFloats,
    /// Number of rows.
    pub tokens: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// As the kernels get them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Operands {
    x: Pointer,
    bias: Pointer,
    out: Pointer,
    x_stride: u32,
    tokens: i32,
    bias_dtype: i32,
    share: Share,
    is_dependent: i32,
}

const _: () = assert!(size_of::<Operands>() == 72, "as cuda/linear.cu and decode_plan.cuh have it");

// SAFETY: `repr(C)`, the fields of `DecodeOperands` in `decode_plan.cuh`; `Operands` in `cuda/linear.cu` has the first of them.
unsafe impl Argument for Operands {}

/// `out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]`, summed in fp32 and rounded once to the dtype of `out`,
/// `[tokens, rows]`, which is that of `x`. At most [`MAX_TOKENS`] tokens.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out` meanwhile.
pub unsafe fn linear(
    queue: Queue,
    weight: &DeviceWeight,
    x: DeviceActivations,
    bias: Option<DeviceFloats>,
    out: DeviceFloats,
) -> Result<()> {
    let layout = weight.layout();
    if x.tokens > MAX_TOKENS {
        return Err(Error::invalid("x", format!("{} tokens", x.tokens), format!("at most {MAX_TOKENS}")));
    }
    x.check(layout.cols, layout.rows, bias, out)?;
    if x.tokens == 0 || layout.rows == 0 {
        return Ok(());
    }
    if x.values.dtype == Dtype::Float32 && x.tokens > MAX_FLOAT32_TOKENS {
        // SAFETY: handed on to the caller.
        return unsafe { linear_in_two(queue, weight, x, bias, out) };
    }
    let problem = Problem {
        operation: Operation::Linear,
        dtype: out.dtype,
        spec: *weight.spec(),
        layout: *layout,
        count: x.tokens,
        is_vectorized: is_vectorized(weight, &x),
    };
    let plan = plan(&problem, queue.device.capability())?;
    let operands = Operands {
        x: Pointer(x.values.buffer.address),
        bias: Pointer(bias.map_or(0, |bias| bias.buffer.address)),
        out: Pointer(out.buffer.address),
        x_stride: u32::try_from(x.stride)
            .map_err(|_| Error::invalid("x", format!("rows {} apart", x.stride), "fewer"))?,
        tokens: x.tokens as i32,
        bias_dtype: bias.map_or(0, |bias| number(bias.dtype)),
        share: plan.share,
        is_dependent: (plan.is_dependent && queue.may_overlap).into(),
    };
    let arguments = Arguments::new().with(weight.kernel()).with(&operands);
    // SAFETY: the parameters of every kernel of `cuda/linear.cu` and `cuda/linear_decode.cu`; lengths were checked, the rest is
    // the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, layout.rows, layout.cols]) }
}

/// [`linear`] of the first tokens, then of the others: in fp32 tensor cores take half as many.
unsafe fn linear_in_two(
    queue: Queue,
    weight: &DeviceWeight,
    x: DeviceActivations,
    bias: Option<DeviceFloats>,
    out: DeviceFloats,
) -> Result<()> {
    let rows = weight.layout().rows;
    for (first, tokens) in [(0, MAX_FLOAT32_TOKENS), (MAX_FLOAT32_TOKENS, x.tokens - MAX_FLOAT32_TOKENS)] {
        let mut sums = behind(out, first * rows);
        sums.buffer.len = tokens * rows;
        // SAFETY: handed on to the caller.
        unsafe { linear(queue, weight, x.part(first, tokens), bias, sums)? };
    }
    Ok(())
}

/// What lies behind the first `count` elements.
pub(super) fn behind(floats: DeviceFloats, count: usize) -> DeviceFloats {
    let DeviceBuffer { address, len } = floats.buffer;
    DeviceFloats::new(address + (count * floats.dtype.size()) as u64, len - count, floats.dtype)
}

/// Whether rows of codes, scales and activations begin where accesses of 16 bytes may.
pub(super) fn is_vectorized(weight: &DeviceWeight, x: &DeviceActivations) -> bool {
    let kernel = weight.kernel();
    let addresses = [kernel.codes.0, kernel.scales.0, kernel.shifts.0, x.values.buffer.address];
    let strides = [weight.layout().row_bytes(), x.stride * x.values.dtype.size()];
    addresses.iter().all(|address| address.is_multiple_of(16)) && strides.iter().all(|stride| stride.is_multiple_of(16))
}

impl DeviceActivations {
    /// `tokens` rows from the row `first` on.
    pub(super) fn part(&self, first: usize, tokens: usize) -> Self {
        Self { values: behind(self.values, first * self.stride), tokens, stride: self.stride }
    }

    /// That the elements are there, `terms` a row, that `out` has room for `outputs` a row, in the same dtype, and that a
    /// bias has as many elements.
    pub(super) fn check(
        &self,
        terms: usize,
        outputs: usize,
        bias: Option<DeviceFloats>,
        out: DeviceFloats,
    ) -> Result<()> {
        if let Some(bias) = bias.filter(|bias| bias.buffer.len != outputs) {
            return Err(Error::invalid("bias", format!("{} elements", bias.buffer.len), format!("{outputs} elements")));
        }
        let needed = if self.tokens == 0 || terms == 0 { 0 } else { (self.tokens - 1) * self.stride + terms };
        if self.values.buffer.len < needed {
            let got = format!("{} elements", self.values.buffer.len);
            return Err(Error::invalid("x", got, format!("{} rows of {terms}", self.tokens)));
        }
        if out.buffer.len != self.tokens * outputs || out.dtype != self.values.dtype {
            let got = format!("{} elements of {}", out.buffer.len, out.dtype.name());
            let dtype = self.values.dtype.name();
            return Err(Error::invalid("out", got, format!("{} rows of {outputs} in {dtype}", self.tokens)));
        }
        Ok(())
    }
}
