//! `LLM.int8()` on a GPU (arXiv 2208.07339): rows of activations to int8, and their product with int8 weights by row.
//!
//! Rounding and multiplying are two steps, so that one rounding serves several products, and so that a kernel that
//! makes activations may round them itself.

use cudarc::driver::sys;

use super::driver::check;
use super::int8_plan::{BOX_BYTES, TILE_TOKENS, gather, pays_from, product, rounding};
use super::launch::{Argument, Arguments, Pointer, launch};
use super::linear::DeviceActivations;
use super::linear_batch::{BatchWorkspace, Gate, linear_batch};
use super::plan::Capability;
use super::tensor_map::{Fetch, Matrix, TensorMap};
use super::weight::{DeviceBuffer, DeviceFloats, DeviceWeight, number};
use super::{Device, Queue};
use crate::format::{BlockSize, Format};
use crate::{Error, Result};

/// Rows of activations in int8, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRows {
    /// int8, from the first of the first row to the last of the last, rows [`codes_stride`] apart.
    pub codes: DeviceBuffer,
    /// fp32, one for each row.
    pub scales: DeviceBuffer,
    /// int32, [`outlier_words`] of them; none where nothing is an outlier.
    pub outliers: Option<DeviceBuffer>,
}

/// Codes from one row to the next: copies move 16 of them.
pub fn codes_stride(cols: usize) -> usize {
    cols.next_multiple_of(16)
}

/// Length of [`DeviceRows::outliers`]: `Outliers` of `cuda/include/lowbit/int8_rows.cuh`.
pub fn outlier_words(cols: usize) -> usize {
    flag_words(cols) + 1 + cols
}

/// Those of them that are zero at the start: a bit for each column.
fn flag_words(cols: usize) -> usize {
    cols.div_ceil(32)
}

/// `RowOperands` of `int8_rows.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RowOperands {
    x: Pointer,
    codes: Pointer,
    scales: Pointer,
    outliers: Pointer,
    x_stride: i64,
    codes_stride: i64,
    cols: i32,
    threshold: f32,
}

// SAFETY: `repr(C)`, the fields of the kernel's `RowOperands` in their order.
unsafe impl Argument for RowOperands {}

/// Rounds rows of `cols` activations to int8, but for outliers: those whose magnitude is not below `threshold`.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses those of `rows`
/// meanwhile.
pub unsafe fn round_rows(
    queue: Queue,
    x: DeviceActivations,
    cols: usize,
    threshold: f32,
    rows: DeviceRows,
) -> Result<()> {
    let Some(operands) = prepare_rows(queue, &x, cols, threshold, &rows)? else { return Ok(()) };
    let row_bytes = x.stride * x.values.dtype.size();
    let is_vectorized = x.values.buffer.address.is_multiple_of(16)
        && row_bytes.is_multiple_of(16)
        && (cols * x.values.dtype.size()).is_multiple_of(16);
    let plan = rounding(x.values.dtype, (x.tokens, cols), is_vectorized);
    let arguments = Arguments::new().with(&operands);
    // SAFETY: the parameter of the kernels of `cuda/int8_rows.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, cols]) }
}

/// What kernels that round rows are told, after the bits of outliers have been set to zero; None for nothing to round. The
/// buffers are as [`round_rows`] has them.
pub(super) fn prepare_rows(
    queue: Queue,
    x: &DeviceActivations,
    cols: usize,
    threshold: f32,
    rows: &DeviceRows,
) -> Result<Option<RowOperands>> {
    check_rows(x, cols, rows)?;
    if x.tokens == 0 || cols == 0 {
        return Ok(None);
    }
    if let Some(outliers) = rows.outliers {
        let _entered = queue.device.enter()?;
        // SAFETY: the buffer has these words and more, as was checked; that it is alive is the caller's.
        let zeroed =
            unsafe { sys::cuMemsetD32Async(outliers.address, 0, flag_words(cols), queue.stream as sys::CUstream) };
        check(zeroed, || format!("cuMemsetD32Async of {} words on {}", flag_words(cols), queue.device))?;
    }
    Ok(Some(RowOperands {
        x: Pointer(x.values.buffer.address),
        codes: Pointer(rows.codes.address),
        scales: Pointer(rows.scales.address),
        outliers: Pointer(rows.outliers.map_or(0, |outliers| outliers.address)),
        x_stride: x.stride as i64,
        codes_stride: codes_stride(cols) as i64,
        cols: cols as i32,
        threshold,
    }))
}

fn check_rows(x: &DeviceActivations, cols: usize, rows: &DeviceRows) -> Result<()> {
    let expect = |argument: &'static str, got: usize, expected: usize| {
        let error = || Error::invalid(argument, format!("{got} elements"), format!("{expected} elements"));
        (got == expected).then_some(()).ok_or_else(error)
    };
    let needed = if x.tokens == 0 || cols == 0 { 0 } else { (x.tokens - 1) * x.stride + cols };
    if x.values.buffer.len < needed {
        let got = format!("{} elements", x.values.buffer.len);
        return Err(Error::invalid("x", got, format!("{} rows of {cols}", x.tokens)));
    }
    if i32::try_from(cols.max(x.tokens)).is_err() {
        return Err(Error::invalid("x", format!("{} rows of {cols}", x.tokens), "numbers that fit int32"));
    }
    expect("codes", rows.codes.len, x.tokens * codes_stride(cols))?;
    expect("scales", rows.scales.len, x.tokens)?;
    rows.outliers.map_or(Ok(()), |outliers| expect("outliers", outliers.len, outlier_words(cols)))
}

/// `ProductOperands` of `int8_product.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct ProductOperands {
    x: Pointer,
    codes: Pointer,
    scales: Pointer,
    outliers: Pointer,
    weights: Pointer,
    weight_scales: Pointer,
    bias: Pointer,
    out: Pointer,
    x_stride: i64,
    codes_stride: i64,
    cols: i32,
    rows: i32,
    tokens: i32,
    weight_scale_dtype: i32,
    bias_dtype: i32,
    is_aligned: i32,
    most_outliers: i32,
}

const _: () = assert!(size_of::<ProductOperands>() == 112, "as int8_product.cuh has it");

// SAFETY: `repr(C)`, the fields of the kernel's `ProductOperands` in their order.
unsafe impl Argument for ProductOperands {}

/// `ProductMaps` of `int8_product.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProductMaps {
    x: TensorMap,
    w: TensorMap,
    x_side: TensorMap,
    w_side: TensorMap,
}

const _: () = assert!(size_of::<ProductMaps>() == 4 * 128, "as int8_product.cuh has it");

// SAFETY: `repr(C)`, maps of 128 bytes at multiples of 64, in the order of the kernel's `ProductMaps`.
unsafe impl Argument for ProductMaps {}

/// `GatherOperands` of `int8_rows.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GatherOperands {
    x: Pointer,
    codes: Pointer,
    scales: Pointer,
    outliers: Pointer,
    weights: Pointer,
    x_side: Pointer,
    w_side: Pointer,
    x_stride: i64,
    codes_stride: i64,
    cols: i32,
    rows: i32,
    tokens: i32,
}

// SAFETY: `repr(C)`, the fields of the kernel's `GatherOperands` in their order.
unsafe impl Argument for GatherOperands {}

/// Numbers of 16 bits that a token, and a row of the weight, has beside its integers: `kSideCapacity`.
pub const SIDE_NUMBERS: usize = 256;

/// Why a weight cannot be multiplied with int8 on any device; none if it can.
fn obstacle_anywhere(weight: &DeviceWeight) -> Option<String> {
    let spec = weight.spec();
    let fits = spec.format == Format::Int8 && spec.block_size == BlockSize::Row && !spec.double_quant;
    (!fits).then(|| "activations are rounded beside int8 weights with a scale a row alone".to_owned())
}

/// Why a weight cannot be multiplied with int8 on a device; none if it can.
fn obstacle(weight: &DeviceWeight, capability: Capability) -> Option<String> {
    let layout = weight.layout();
    if let Some(reason) = obstacle_anywhere(weight) {
        return Some(reason);
    }
    if capability.compute != 90 {
        return Some(format!(
            "its kernels are for compute capability 90 (Hopper), and this GPU has {}",
            capability.compute
        ));
    }
    let is_aligned = layout.cols.is_multiple_of(16) && weight.kernel().codes.0.is_multiple_of(16) && layout.cols > 0;
    (!is_aligned).then(|| format!("its kernels take columns in multiples of 16, and the weight has {}", layout.cols))
}

/// From how many tokens on a product rounds its activations to int8: with `is_choosy` from where that pays, and else
/// from where no kernel takes so few as they are. An error says why never.
pub fn rounded_from(device: usize, weight: &DeviceWeight, is_choosy: bool) -> Result<usize> {
    let refused = |reason| Error::Unsupported { what: "activation=\"int8\" on CUDA", reason };
    if let Some(reason) = obstacle_anywhere(weight) {
        return Err(refused(reason));
    }
    let (layout, capability) = (weight.layout(), Device::get(device)?.capability());
    match obstacle(weight, capability) {
        Some(reason) => Err(refused(reason)),
        None if !is_choosy => Ok(super::MAX_TOKENS + 1),
        None => pays_from(layout, capability)
            .ok_or_else(|| refused(format!("{} x {} is too small to gain from it", layout.rows, layout.cols))),
    }
}

/// `out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]` with x as `rows` has it, in int8 but for columns of outliers, which
/// are taken from `x`. Summed in int32 and fp32, and rounded once to the dtype of `out`, which is that of `x`. With
/// outliers, `side` has [`SIDE_NUMBERS`] int16 for each token and each row of the weight.
///
/// More columns of outliers than `side` has room for are slow. With a `workspace` of [`batch_sizes`](super::batch_sizes)
/// x is multiplied as it is then, which the device decides.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done; nobody else uses `out`, `side` and
/// `workspace` meanwhile. `rows` is what [`round_rows`] made of `x`, or as good.
pub unsafe fn linear_int8(
    queue: Queue,
    weight: &DeviceWeight,
    (x, rows): (DeviceActivations, DeviceRows),
    side: Option<DeviceBuffer>,
    bias: Option<DeviceFloats>,
    out: DeviceFloats,
    workspace: Option<BatchWorkspace>,
) -> Result<()> {
    check_product(queue, weight, &x, &rows, side, bias, out)?;
    let layout = weight.layout();
    if x.tokens == 0 || layout.rows == 0 {
        return Ok(());
    }
    // Each of these waits for all before it but to make itself ready: it may always start early.
    let queue = Queue { may_overlap: true, ..queue };
    if let (Some(outliers), Some(side)) = (rows.outliers, side) {
        let operands = gather_operands(weight, &x, &rows, outliers, side);
        let plan = gather(x.values.dtype, x.tokens + layout.rows, queue.device.capability());
        let arguments = Arguments::new().with(&operands);
        // SAFETY: the parameter of the kernels of `cuda/int8_rows.cu` that gather; the rest is the caller's.
        unsafe { launch(queue, &plan, arguments, &[x.tokens, layout.rows, layout.cols])? };
    }
    let (plan, box_rows) = product(out.dtype, layout, x.tokens, queue.device.capability());
    let maps = product_maps(weight, x.tokens, &rows, side, box_rows)?;
    let behind = rows.outliers.zip(workspace).map(|(outliers, workspace)| (count_of(outliers, layout.cols), workspace));
    let most_outliers = if behind.is_some() { SIDE_NUMBERS as i32 } else { i32::MAX };
    let operands = product_operands(weight, &x, &rows, bias, out, most_outliers);
    let arguments = Arguments::new().with(&maps).with(&operands);
    // SAFETY: the parameters of the kernels of `cuda/linear_int8.cu`; lengths were checked, the rest is the caller's.
    unsafe { launch(queue, &plan, arguments, &[x.tokens, layout.rows, layout.cols])? };
    let Some((address, workspace)) = behind else { return Ok(()) };
    let gate = Gate { address, above: most_outliers };
    // SAFETY: handed on to the caller.
    unsafe { linear_batch(queue, weight, x, bias, out, workspace, Some(gate)) }
}

/// Where the number of columns of outliers lies.
fn count_of(outliers: DeviceBuffer, cols: usize) -> u64 {
    outliers.address + (4 * flag_words(cols)) as u64
}

fn check_product(
    queue: Queue,
    weight: &DeviceWeight,
    x: &DeviceActivations,
    rows: &DeviceRows,
    side: Option<DeviceBuffer>,
    bias: Option<DeviceFloats>,
    out: DeviceFloats,
) -> Result<()> {
    let layout = weight.layout();
    if let Some(reason) = obstacle(weight, queue.device.capability()) {
        return Err(Error::Unsupported { what: "a product of int8", reason });
    }
    check_rows(x, layout.cols, rows)?;
    x.check(layout.cols, layout.rows, bias, out)?;
    let needed = rows.outliers.map_or(0, |_| SIDE_NUMBERS * (x.tokens + layout.rows));
    let got = side.map_or(0, |side| side.len);
    if got != needed {
        return Err(Error::invalid("side", format!("{got} elements"), format!("{needed} elements")));
    }
    Ok(())
}

/// Where the numbers beside the integers of activations and of the weight lie.
fn sides(side: DeviceBuffer, tokens: usize) -> (u64, u64) {
    (side.address, side.address + (2 * SIDE_NUMBERS * tokens) as u64)
}

fn gather_operands(
    weight: &DeviceWeight,
    x: &DeviceActivations,
    rows: &DeviceRows,
    outliers: DeviceBuffer,
    side: DeviceBuffer,
) -> GatherOperands {
    let (layout, (x_side, w_side)) = (weight.layout(), sides(side, x.tokens));
    GatherOperands {
        x: Pointer(x.values.buffer.address),
        codes: Pointer(rows.codes.address),
        scales: Pointer(rows.scales.address),
        outliers: Pointer(outliers.address),
        weights: weight.kernel().codes,
        x_side: Pointer(x_side),
        w_side: Pointer(w_side),
        x_stride: x.stride as i64,
        codes_stride: codes_stride(layout.cols) as i64,
        cols: layout.cols as i32,
        rows: layout.rows as i32,
        tokens: x.tokens as i32,
    }
}

/// Where nothing is an outlier, nothing beside the integers is copied: any map will do.
fn product_maps(
    weight: &DeviceWeight,
    tokens: usize,
    rows: &DeviceRows,
    side: Option<DeviceBuffer>,
    box_rows: usize,
) -> Result<ProductMaps> {
    let layout = weight.layout();
    let (cols, row_bytes) = (layout.cols, codes_stride(layout.cols));
    let map = |address, rows, cols, element_bytes, row_bytes, box_rows| {
        let matrix = Matrix { address, element_bytes, shape: [rows, cols], row_bytes };
        matrix.map([BOX_BYTES / element_bytes as u32, box_rows as u32], Fetch::Bytes256)
    };
    let x = map(rows.codes.address, tokens, cols, 1, row_bytes, TILE_TOKENS)?;
    let w = map(weight.kernel().codes.0, layout.rows, cols, 1, cols, box_rows)?;
    let Some(side) = side else { return Ok(ProductMaps { x, w, x_side: x, w_side: w }) };
    let (x_side, w_side) = sides(side, tokens);
    let side_of = |address, rows, box_rows| map(address, rows, SIDE_NUMBERS, 2, 2 * SIDE_NUMBERS, box_rows);
    Ok(ProductMaps {
        x,
        w,
        x_side: side_of(x_side, tokens, TILE_TOKENS)?,
        w_side: side_of(w_side, layout.rows, box_rows)?,
    })
}

fn product_operands(
    weight: &DeviceWeight,
    x: &DeviceActivations,
    rows: &DeviceRows,
    bias: Option<DeviceFloats>,
    out: DeviceFloats,
    most_outliers: i32,
) -> ProductOperands {
    let layout = weight.layout();
    let row_bytes = layout.rows * out.dtype.size();
    ProductOperands {
        x: Pointer(x.values.buffer.address),
        codes: Pointer(rows.codes.address),
        scales: Pointer(rows.scales.address),
        outliers: Pointer(rows.outliers.map_or(0, |outliers| outliers.address)),
        weights: weight.kernel().codes,
        weight_scales: weight.kernel().scales,
        bias: Pointer(bias.map_or(0, |bias| bias.buffer.address)),
        out: Pointer(out.buffer.address),
        x_stride: x.stride as i64,
        codes_stride: codes_stride(layout.cols) as i64,
        cols: layout.cols as i32,
        rows: layout.rows as i32,
        tokens: x.tokens as i32,
        weight_scale_dtype: number(weight.spec().scale_dtype),
        bias_dtype: bias.map_or(0, |bias| number(bias.dtype)),
        is_aligned: (row_bytes.is_multiple_of(16) && out.buffer.address.is_multiple_of(16)).into(),
        most_outliers,
    }
}
