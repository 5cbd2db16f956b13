//! `y = x @ W^T + bias` for more tokens than [`linear`](super::linear()) takes, where a kernel does that in less time than
//! unpacking the weight.

use super::batch::{self, BatchPlan, BatchShare, BatchSizes, Boxes, Choice};
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::{DeviceActivations, behind, is_vectorized, linear};
use super::plan::{Operation, Problem};
use super::tensor_map::{Fetch, Matrix, TensorMap};
use super::weight::{DeviceBuffer, DeviceFloats, DeviceWeight, number};
use super::{Device, Queue};
use crate::{Error, Result};

/// Memory that a product needs meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct BatchWorkspace {
    /// Float32.
    pub partials: DeviceBuffer,
    /// Int32: 0, and left as 0. No two products that may run at the same time have the same ones.
    pub arrivals: DeviceBuffer,
}

/// As the kernels get them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Operands {
    x: Pointer,
    bias: Pointer,
    out: Pointer,
    partials: Pointer,
    arrivals: Pointer,
    gate: Pointer,
    x_stride: u32,
    tokens: i32,
    bias_dtype: i32,
    share: BatchShare,
    gate_above: i32,
}

const _: () = assert!(size_of::<Operands>() == 96, "as batch_plan.cuh has it");

// SAFETY: `repr(C)`, the fields of `BatchOperands` in `batch_plan.cuh`.
unsafe impl Argument for Operands {}

/// For the copy engine, as the kernels get it; they do not look at it where there is none.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Maps {
    x: TensorMap,
    codes: TensorMap,
}

// SAFETY: `repr(C)`, the fields of `BatchMaps` in `batch_plan.cuh`.
unsafe impl Argument for Maps {}

impl Maps {
    fn new(weight: &DeviceWeight, x: &DeviceActivations, boxes: Option<Boxes>) -> Result<Self> {
        let Some(boxes) = boxes else { return Ok(Self { x: TensorMap::unused(), codes: TensorMap::unused() }) };
        let layout = weight.layout();
        let size = x.values.dtype.size();
        let row_bytes = weight.kernel().row_codes as usize * layout.bits / 8;
        let activations = Matrix {
            address: x.values.buffer.address,
            element_bytes: size,
            shape: [x.tokens, layout.cols],
            row_bytes: x.stride * size,
        };
        let codes =
            Matrix { address: weight.kernel().codes.0, element_bytes: 1, shape: [layout.rows, row_bytes], row_bytes };
        Ok(Self { x: activations.map(boxes.x, Fetch::Bytes128)?, codes: codes.map(boxes.codes, Fetch::Bytes128)? })
    }
}

/// The sizes of the workspace that [`linear_batch`] needs, with a gate or without, and whether it takes less time than
/// unpacking the weight; none where no kernel takes weight and activations.
pub fn batch_sizes(device: &Device, weight: &DeviceWeight, x: &DeviceActivations) -> Option<(BatchSizes, bool)> {
    planned(device, weight, x).map(|choice| (choice.sizes(), choice.is_faster))
}

fn planned(device: &Device, weight: &DeviceWeight, x: &DeviceActivations) -> Option<Choice> {
    let problem = Problem {
        operation: Operation::Linear,
        dtype: x.values.dtype,
        spec: *weight.spec(),
        layout: *weight.layout(),
        count: x.tokens,
        is_vectorized: is_vectorized(weight, x),
    };
    batch::plan(&problem, device.capability())
}

/// What decides on the device whether a product is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    /// The address of an int32 that work before on the queue has written.
    pub address: u64,
    /// The product is done where that is above this.
    pub above: i32,
}

/// `out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]`, summed in fp32 and rounded once to the dtype of `out`,
/// `[tokens, rows]`, which is that of `x`. A weight is the product of a code's value, rounded to that dtype, and its scale,
/// rounded once more. Behind a `gate` that is closed nothing is done.
///
/// # Errors
/// `Unsupported` where [`batch_sizes`] gives none.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out` or `workspace`
/// meanwhile. What a gate is decided by is in that memory, too.
pub unsafe fn linear_batch(
    queue: Queue,
    weight: &DeviceWeight,
    x: DeviceActivations,
    bias: Option<DeviceFloats>,
    out: DeviceFloats,
    workspace: BatchWorkspace,
    gate: Option<Gate>,
) -> Result<()> {
    let layout = weight.layout();
    x.check(layout.cols, layout.rows, bias, out)?;
    if x.tokens == 0 || layout.rows == 0 {
        return Ok(());
    }
    let choice = planned(queue.device, weight, &x).ok_or_else(|| Error::Unsupported {
        what: "a product with the packed weight",
        reason: format!("no kernel takes {} of block size {}", layout.cols, layout.block_size),
    })?;
    let (planned, left) = choice.divided.filter(|_| gate.is_none()).unwrap_or((choice.whole, 0));
    let BatchPlan { plan, share, sizes, boxes } = planned;
    let most = x.tokens - left;
    if left > 0 {
        // SAFETY: handed on to the caller.
        unsafe { linear(queue, weight, x.part(most, left), bias, behind(out, most * layout.rows))? };
    }
    let x = x.part(0, most);
    for (name, buffer, needed) in
        [("partials", workspace.partials, sizes.partials), ("arrivals", workspace.arrivals, sizes.arrivals)]
    {
        if buffer.len < needed {
            return Err(Error::invalid(name, format!("{} elements", buffer.len), format!("{needed}")));
        }
    }
    // The kernel waits for all before it but to make itself ready: it may always start early.
    let queue = Queue { may_overlap: true, ..queue };
    let operands = Operands {
        x: Pointer(x.values.buffer.address),
        bias: Pointer(bias.map_or(0, |bias| bias.buffer.address)),
        out: Pointer(out.buffer.address),
        partials: Pointer(workspace.partials.address),
        arrivals: Pointer(workspace.arrivals.address),
        gate: Pointer(gate.map_or(0, |gate| gate.address)),
        x_stride: u32::try_from(x.stride)
            .map_err(|_| Error::invalid("x", format!("rows {} apart", x.stride), "fewer"))?,
        tokens: x.tokens as i32,
        bias_dtype: bias.map_or(0, |bias| number(bias.dtype)),
        share,
        gate_above: gate.map_or(0, |gate| gate.above),
    };
    let maps = Maps::new(weight, &x, boxes)?;
    let arguments = Arguments::new().with(weight.kernel()).with(&operands).with(&maps);
    // SAFETY: the parameters of every kernel of `cuda/linear_batch.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, layout.rows, layout.cols]) }
}
