//! Packing weights in device memory: the same codes and scales as on the CPU.

use cudarc::driver::sys;

use super::Queue;
use super::driver::check;
use super::launch::{Argument, Arguments, Pointer, launch};
use super::plan::{Operation, Plan, Problem, plan, sums_of};
use super::weight::{DeviceBuffer, DeviceFloats, DeviceWeight, number, row_codes};
use crate::codebook::{self, Codebook};
use crate::dtype::Dtype;
use crate::format::Shift;
use crate::{Error, Result};

/// Bins in which a number's rank among the values of a codebook is looked up: `kBins` of `quantize_codes.cuh`.
const BINS: usize = 32;
/// Weights of a thread's vector: `kVector` of `quantize_codes.cuh`.
const VECTOR: usize = 16;
/// What the status starts as: beyond any index.
const NONE: i64 = -1;

/// A strided float tensor `[experts, rows, cols]`, strides in elements.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSource {
    /// Address of element [0, 0, 0].
    pub address: u64,
    /// Its element type.
    pub dtype: Dtype,
    /// Experts, rows of one, columns.
    pub shape: [usize; 3],
    /// Elements from one to the next.
    pub strides: [isize; 3],
}

/// Memory that packing needs meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    /// Two int64. Where the work may fail, they tell where it did.
    pub status: DeviceBuffer,
    /// With double quantization: a float32 for each block.
    pub scales: Option<DeviceBuffer>,
    /// With double quantization: float64, two for each of up to 256 partial sums.
    pub sums: Option<DeviceBuffer>,
}

/// As the kernels get them: `Source`, `Rule` and `Target` of `quantize_codes.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct KernelSource {
    base: Pointer,
    shape: [i64; 3],
    strides: [i64; 3],
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Rule {
    limit: f32,
    bin_scale: f32,
    steps: i32,
    is_sorted: i32,
    zero_code: i32,
    signed_absmax: i32,
    shift: i32,
    thresholds: [f32; codebook::LEN],
    order: [u8; codebook::LEN],
    ranks: [u8; BINS],
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Target {
    codes: Pointer,
    scales: Pointer,
    shifts: Pointer,
    status: Pointer,
    block_size: i64,
    blocks_per_row: i64,
    row_codes: i64,
    block_count: i64,
    straddles_rows: i32,
    bits: i32,
    scale_dtype: i32,
    shift_dtype: i32,
}

const _: () = assert!(size_of::<KernelSource>() == 56 && size_of::<Rule>() == 140 && size_of::<Target>() == 80);

// SAFETY: `repr(C)`, the fields of the C++ struct in their order.
unsafe impl Argument for KernelSource {}
// SAFETY: as above.
unsafe impl Argument for Rule {}
// SAFETY: as above.
unsafe impl Argument for Target {}

/// Packs `source` into the buffers of `out`; `custom` is the table of a custom format. `refuses_nonfinite` makes a NaN or
/// infinity an error; otherwise its whole block becomes NaN.
///
/// Waits for the result where the work may fail: where NaN is refused, or scales are stored in less than fp32 or may
/// overflow it. With an error, what `out` holds is unspecified.
///
/// # Safety
/// All buffers are in memory of the queue's device and alive until the work is done, every element of the source's view is
/// readable, and nobody else uses the buffers of `out` and `workspace` meanwhile.
pub unsafe fn quantize(
    queue: Queue,
    source: &DeviceSource,
    out: &DeviceWeight,
    custom: Option<&[f32]>,
    refuses_nonfinite: bool,
    workspace: Workspace,
) -> Result<()> {
    let (spec, layout) = (out.spec(), out.layout());
    let [experts, rows, cols] = source.shape;
    if experts * rows != layout.rows || cols != layout.cols {
        let expected = format!("{} rows of {}", layout.rows, layout.cols);
        return Err(Error::invalid("tensor", format!("shape {:?}", source.shape), expected));
    }
    workspace.check(out)?;
    let codebook = out.table(custom)?;
    let rule = Rule::new(out, codebook.as_ref());
    let may_overflow = spec.format.has_shift() || (spec.scale_dtype != Dtype::Float32 && !spec.double_quant);
    let may_fail = refuses_nonfinite || may_overflow;
    if may_fail {
        // SAFETY: the status was checked to have two int64.
        unsafe { clear(queue, workspace.status)? };
    }
    let target =
        Target { status: Pointer(if may_fail { workspace.status.address } else { 0 }), ..Target::new(out, workspace) };
    let plan = planned(queue, source, out, Operation::Quantize, layout.block_count())?;
    let from = KernelSource {
        base: Pointer(source.address),
        shape: source.shape.map(|length| length as i64),
        strides: source.strides.map(|stride| stride as i64),
    };
    let arguments = Arguments::new().with(&from).with(&rule).with(&target);
    // SAFETY: the parameters of `quantize_*`; the buffers have the lengths of the layout.
    unsafe { launch(queue, &plan, arguments, &source.shape)? };
    if let (Some(scales), Some(sums)) = (workspace.scales, workspace.sums) {
        // SAFETY: handed on to the caller.
        unsafe { quantize_scales(queue, source, out, scales, sums)? };
    }
    if may_fail {
        // SAFETY: handed on to the caller.
        unsafe { read_status(queue, source, out, refuses_nonfinite, workspace.status)? };
    }
    Ok(())
}

/// The plan of a step of packing `source`.
fn planned(
    queue: Queue,
    source: &DeviceSource,
    out: &DeviceWeight,
    operation: Operation,
    count: usize,
) -> Result<Plan> {
    let layout = out.layout();
    let [_, rows, cols] = source.shape;
    let is_dense = source.strides[2] == 1
        && (rows <= 1 || source.strides[1] == cols as isize)
        && (source.shape[0] <= 1 || source.strides[0] == (rows * cols) as isize);
    let is_vectorized = is_dense
        && layout.block_size.is_multiple_of(VECTOR)
        && layout.cols.is_multiple_of(layout.block_size)
        && source.address.is_multiple_of(16)
        && out.kernel().codes.0.is_multiple_of(2 * layout.bits as u64);
    let problem = Problem { operation, dtype: source.dtype, spec: *out.spec(), layout: *layout, count, is_vectorized };
    plan(&problem, queue.device.capability())
}

/// Quantizes the scales of all blocks in turn.
unsafe fn quantize_scales(
    queue: Queue,
    source: &DeviceSource,
    out: &DeviceWeight,
    scales: DeviceBuffer,
    sums: DeviceBuffer,
) -> Result<()> {
    let weight = out.kernel();
    let (from, count, to) = (Pointer(scales.address), scales.len as i64, Pointer(sums.address));
    let sum_count = sums_of(scales.len) as i32;
    let plan = planned(queue, source, out, Operation::SumScales, scales.len)?;
    let arguments = Arguments::new().with(&from).with(&count).with(&to);
    // SAFETY: the parameters of `sum_scales`; there is room for its sums.
    unsafe { launch(queue, &plan, arguments, &[scales.len])? };
    let plan = planned(queue, source, out, Operation::QuantizeScales, scales.len)?;
    let arguments = Arguments::new().with(&from).with(&count).with(&to).with(&sum_count);
    let arguments = arguments.with(&weight.scales).with(&weight.scale_2).with(&weight.scale_offset);
    // SAFETY: the parameters of `quantize_scales`; the buffers of `out` have the lengths of its layout.
    unsafe { launch(queue, &plan, arguments, &[scales.len]) }
}

/// Waits for the work, and makes an error of what it left in the status.
unsafe fn read_status(
    queue: Queue,
    source: &DeviceSource,
    out: &DeviceWeight,
    refuses_nonfinite: bool,
    status: DeviceBuffer,
) -> Result<()> {
    let mut found = [NONE; 2];
    // SAFETY: two int64 on both sides; the status was checked to have them.
    unsafe { read(queue, status.address, &mut found)? };
    // -1 as an unsigned number is beyond any index.
    let [nonfinite, overflow] = found.map(i64::cast_unsigned);
    if refuses_nonfinite && nonfinite != u64::MAX && nonfinite <= overflow {
        let [experts, rows, cols] = source.shape;
        let (row, col) = (nonfinite as usize / cols, nonfinite as usize % cols);
        let (expert, row) = (row / rows, row % rows);
        let at = [expert, row, col];
        // SAFETY: an element of the source.
        let value = unsafe { element(queue, source, at)? };
        let index = if experts == 1 { vec![row, col] } else { at.to_vec() };
        return Err(Error::NonFinite { index, value });
    }
    if overflow != u64::MAX {
        let got = format!("{} with weights whose scale is beyond it", out.spec().scale_dtype.name());
        return Err(Error::invalid("scale_dtype", got, "float32, or smaller weights"));
    }
    Ok(())
}

/// The element of `source` at [expert, row, col].
unsafe fn element(queue: Queue, source: &DeviceSource, at: [usize; 3]) -> Result<f32> {
    let offset: isize = at.iter().zip(source.strides).map(|(&index, stride)| index as isize * stride).sum();
    let address = source.address.wrapping_add_signed((offset * source.dtype.size() as isize) as i64);
    let mut bits = [0_u8; 4];
    let size = source.dtype.size();
    // SAFETY: the element's bytes, on the caller's word.
    unsafe { read(queue, address, &mut bits[..size])? };
    Ok(match source.dtype {
        Dtype::Float32 => f32::from_le_bytes(bits),
        Dtype::Float16 => half::f16::from_le_bytes([bits[0], bits[1]]).to_f32(),
        Dtype::Bfloat16 => half::bf16::from_le_bytes([bits[0], bits[1]]).to_f32(),
    })
}

/// Fills a status with -1.
unsafe fn clear(queue: Queue, status: DeviceBuffer) -> Result<()> {
    let _entered = queue.device.enter()?;
    let words = status.len * size_of::<i64>() / size_of::<u32>();
    // SAFETY: as many words as the status has, on the caller's word.
    let filled = unsafe { sys::cuMemsetD32Async(status.address, u32::MAX, words, queue.stream as sys::CUstream) };
    check(filled, || format!("cuMemsetD32Async on {}", queue.device))
}

/// Copies device memory to the host, behind what is queued.
unsafe fn read<T: Copy>(queue: Queue, address: u64, into: &mut [T]) -> Result<()> {
    let _entered = queue.device.enter()?;
    let stream = queue.stream as sys::CUstream;
    let named = |call: &str| format!("{call} on {}", queue.device);
    // SAFETY: `into` has room for what is copied, and is alive until the stream has done it.
    unsafe {
        let copied = sys::cuMemcpyDtoHAsync_v2(into.as_mut_ptr().cast(), address, size_of_val(into), stream);
        check(copied, || named("cuMemcpyDtoHAsync"))?;
        check(sys::cuStreamSynchronize(stream), || named("cuStreamSynchronize"))
    }
}

impl Workspace {
    fn check(&self, out: &DeviceWeight) -> Result<()> {
        let blocks = out.layout().block_count();
        let expect = |name: &'static str, buffer: Option<DeviceBuffer>, len: usize| match buffer {
            Some(buffer) if buffer.len == len => Ok(()),
            _ => Err(Error::invalid(name, format!("{buffer:?}"), format!("{len} elements"))),
        };
        expect("status", Some(self.status), 2)?;
        if out.spec().double_quant {
            expect("scales", self.scales, blocks)?;
            expect("sums", self.sums, 2 * sums_of(blocks))?;
        }
        Ok(())
    }
}

impl Rule {
    fn new(out: &DeviceWeight, codebook: Option<&Codebook>) -> Self {
        let spec = out.spec();
        let mut rule = Self {
            limit: codebook.map_or(f32::from(i8::MAX), Codebook::limit),
            bin_scale: 0.0,
            steps: 0,
            is_sorted: 1,
            zero_code: 0,
            signed_absmax: spec.signed_absmax.into(),
            shift: shift_number(spec.format.shift()),
            thresholds: [f32::INFINITY; codebook::LEN],
            order: [0; codebook::LEN],
            ranks: [0; BINS],
        };
        if let Some(codebook) = codebook {
            rule.is_sorted = codebook.is_sorted().into();
            rule.zero_code = codebook.encode(0.0).into();
            rule.thresholds[..codebook.thresholds().len()].copy_from_slice(codebook.thresholds());
            rule.order = *codebook.order();
            rule.fill_bins(codebook);
        }
        rule
    }

    /// For each bin, the thresholds in bins below it; and the most that numbers in one bin have to be compared with.
    fn fill_bins(&mut self, codebook: &Codebook) {
        // A little less than half of the bins to each side, so that rounding leads to none beyond.
        self.bin_scale = ((BINS / 2) as f32 - 0.5) / codebook.limit();
        let mut bins = [0_u8; BINS];
        let mut compared = [0_u8; BINS];
        for &threshold in codebook.thresholds().iter().filter(|threshold| threshold.is_finite()) {
            let bin = self.bin(threshold);
            bins[bin] += 1;
            // The last number of a bin: none in it is larger.
            let is_last = self.bin(threshold.next_up()) != bin;
            compared[bin] += u8::from(!is_last);
        }
        let mut below = 0;
        for (rank, &count) in self.ranks.iter_mut().zip(&bins) {
            *rank = below;
            below += count;
        }
        self.steps = compared.into_iter().max().unwrap_or(0).into();
    }

    /// The bin of a number, as the kernel finds it for those up to the limit: bins are in the order of their numbers. In
    /// f64 the product is exact.
    fn bin(&self, u: f32) -> usize {
        let half = BINS as i64 / 2;
        let place = (f64::from(u) * f64::from(self.bin_scale)).floor() as i64;
        (place.clamp(-half, half - 1) + half) as usize
    }
}

/// `Shift` of `cuda/include/lowbit/weight.cuh`.
fn shift_number(shift: Option<Shift>) -> i32 {
    match shift {
        None => 0,
        Some(Shift::Minimum) => 1,
        Some(Shift::Middle) => 2,
    }
}

impl Target {
    fn new(out: &DeviceWeight, workspace: Workspace) -> Self {
        let (layout, weight, dtype) = (out.layout(), out.kernel(), number(out.spec().scale_dtype));
        // Double quantization takes the scales of all blocks in fp32.
        let plain = workspace.scales.filter(|_| out.spec().double_quant);
        Self {
            codes: weight.codes,
            scales: plain.map_or(weight.scales, |scales| Pointer(scales.address)),
            shifts: weight.shifts,
            status: Pointer(0),
            block_size: layout.block_size as i64,
            blocks_per_row: layout.blocks_per_row() as i64,
            row_codes: row_codes(layout) as i64,
            block_count: layout.block_count() as i64,
            straddles_rows: layout.straddles_rows.into(),
            bits: layout.bits as i32,
            scale_dtype: if plain.is_some() { number(Dtype::Float32) } else { dtype },
            shift_dtype: dtype,
        }
    }
}

impl DeviceFloats {
    /// Floats at an address.
    pub fn new(address: u64, len: usize, dtype: Dtype) -> Self {
        Self { buffer: DeviceBuffer { address, len }, dtype }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BlockOrder, BlockSize, Format, Spec};
    use proptest::prelude::*;

    fn weight(format: Format) -> DeviceWeight {
        let spec = Spec {
            format,
            block_size: BlockSize::Elements(16),
            block_order: BlockOrder::Row,
            scale_dtype: Dtype::Float32,
            double_quant: false,
            signed_absmax: false,
        };
        let buffer = |len| DeviceBuffer { address: 0, len };
        let custom = (format == Format::Custom).then(|| buffer(2));
        let shifts = format.has_shift().then(|| buffer(1));
        DeviceWeight::new(spec, (1, 16), buffer(8), buffer(1), None, shifts, custom).expect("right lengths")
    }

    /// The kernel's `quick_code` where it is used, and its `any_code`, step by step.
    fn code_of(rule: &Rule, u: f32) -> u8 {
        let mut rank = usize::from(rule.ranks[rule.bin(u)]);
        for _ in 0..rule.steps {
            rank += usize::from(u > rule.thresholds[rank]);
        }
        rule.order[rank]
    }

    fn agrees(codebook: &Codebook, format: Format, u: f32) {
        let rule = Rule::new(&weight(format), Some(codebook));
        assert_eq!(code_of(&rule, u), codebook.encode(u), "{u:e} in {codebook:?}");
    }

    #[test]
    fn bins_rank_the_neighbours_of_every_threshold() {
        for format in [Format::Nf4, Format::Fp4, Format::Int4, Format::Uint4] {
            let codebook = format.codebook().expect("a built-in table");
            for &threshold in codebook.thresholds() {
                for u in [threshold.next_down(), threshold, threshold.next_up()] {
                    if u.abs() <= codebook.limit() {
                        agrees(&codebook, format, u);
                    }
                }
            }
            for i in -2000..=2000 {
                agrees(&codebook, format, codebook.limit() * i as f32 / 2000.0);
            }
        }
    }

    #[test]
    fn the_tables_in_use_are_settled_in_one_comparison() {
        for format in [Format::Nf4, Format::Int4, Format::Uint4, Format::Fp4] {
            let rule = Rule::new(&weight(format), format.codebook().as_ref());
            assert!(rule.steps <= 1, "{format:?}: {}", rule.steps);
        }
    }

    proptest! {
        #[test]
        fn bins_rank_as_the_codebook_does(
            values in prop::collection::vec(-1.0_f32..1.0, 2..=16),
            factor in prop::sample::select(vec![1.0_f32, 1e-3, 12.0]),
            us in prop::collection::vec(-1.000_001_f32..1.000_001, 1..50),
        ) {
            let values: Vec<f32> = values.iter().map(|value| value * factor).collect();
            if let Ok(codebook) = Codebook::new(&values) && codebook.limit() > 0.0 {
                for u in us {
                    agrees(&codebook, Format::Custom, u * codebook.limit());
                }
            }
        }
    }
}
