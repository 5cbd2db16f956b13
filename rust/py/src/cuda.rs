//! Weights and operations in the memory of CUDA devices. Addresses are the driver's; nothing here reads behind them.

use lowbit_core::cuda::{
    self, BatchWorkspace, Device, DeviceActivations, DeviceBuffer, DeviceFloats, DeviceRows, DeviceSource,
    DeviceWeight, Queue, Window, Workspace,
};
use lowbit_core::dtype::Dtype;
use lowbit_core::{Error, Result};
use pyo3::prelude::*;

use crate::buffers::{Buffer, FloatBuffer, slice};
use crate::errors::{run, to_python};
use crate::spec::PySpec;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("CUDA_MAX_TOKENS", cuda::MAX_TOKENS)?;
    module.add_class::<CudaWeight>()?;
    module.add_function(wrap_pyfunction!(has_cuda_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_device, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_quantize, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_dequantize, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_dequantize_rows, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_linear, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_batch_sizes, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_linear_batch, module)?)?;
    module.add("CUDA_SIDE_NUMBERS", cuda::SIDE_NUMBERS)?;
    module.add_function(wrap_pyfunction!(cuda_int8_sizes, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_round_rows, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_linear_int8, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_rounded_from, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_linear_grouped, module)?)
}

/// Addresses of the tensors of a packed [rows, cols] weight on the device of this number. It borrows: the caller keeps the
/// tensors alive until the work that uses them is done. Lengths are checked against spec and shape when it is made.
#[pyclass(module = "lowbit_rs._native", frozen)]
pub(crate) struct CudaWeight {
    device: usize,
    weight: DeviceWeight,
}

#[pymethods]
impl CudaWeight {
    #[new]
    #[allow(clippy::too_many_arguments)] // one for each tensor of a weight
    #[pyo3(signature = (
        device, spec, rows, cols, codes, scale, scale_2=None, scale_offset=None, shift=None, codebook=None
    ))]
    fn new(
        device: usize,
        spec: &PySpec,
        rows: usize,
        cols: usize,
        codes: Buffer,
        scale: Buffer,
        scale_2: Option<Buffer>,
        scale_offset: Option<Buffer>,
        shift: Option<Buffer>,
        codebook: Option<Buffer>,
    ) -> PyResult<Self> {
        let double_quant = match (scale_2, scale_offset) {
            (Some(scale_2), Some(offset)) => Some((buffer(scale_2), buffer(offset))),
            (None, None) => None,
            _ => {
                let error = Error::invalid("scale_offset", "one of scale_2 and scale_offset", "both or neither");
                return Err(to_python(&error));
            }
        };
        let (shifts, table) = (shift.map(buffer), codebook.map(buffer));
        let weight = DeviceWeight::new(spec.0, (rows, cols), buffer(codes), buffer(scale), double_quant, shifts, table);
        Ok(Self { device, weight: weight.map_err(|error| to_python(&error))? })
    }

    /// The device of its tensors.
    #[getter]
    fn device(&self) -> usize {
        self.device
    }

    /// Rows of the matrix.
    #[getter]
    fn rows(&self) -> usize {
        self.weight.layout().rows
    }

    /// Columns of the matrix.
    #[getter]
    fn cols(&self) -> usize {
        self.weight.layout().cols
    }
}

impl CudaWeight {
    pub(crate) fn weight(&self) -> &DeviceWeight {
        &self.weight
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.weight.layout().rows, self.weight.layout().cols)
    }

    pub(crate) fn queue(&self, stream: usize) -> Result<Queue> {
        Ok(Queue { device: Device::get(self.device)?, stream, may_overlap: false })
    }
}

fn buffer((address, len): Buffer) -> DeviceBuffer {
    DeviceBuffer { address: address as u64, len }
}

pub(crate) fn floats(argument: &'static str, (address, len, dtype): &FloatBuffer) -> Result<DeviceFloats> {
    Ok(DeviceFloats::new(*address as u64, *len, Dtype::parse(argument, dtype)?))
}

pub(crate) fn optional_floats(argument: &'static str, buffer: Option<&FloatBuffer>) -> Result<Option<DeviceFloats>> {
    buffer.map(|buffer| floats(argument, buffer)).transpose()
}

/// Whether this build has CUDA kernels.
#[pyfunction]
fn has_cuda_kernels() -> bool {
    cuda::is_built()
}

/// Compute capability, multiprocessors and shared memory of a device; an error says why there is none.
#[pyfunction]
fn cuda_device(py: Python<'_>, ordinal: usize) -> PyResult<(u32, u32, u32)> {
    let capability = run(py, || Device::get(ordinal).map(Device::capability))?;
    Ok((capability.compute, capability.multiprocessors, capability.shared_bytes))
}

/// Packs the [experts, rows, cols] float tensor at an address, strides in elements, into `out`. The codebook of a custom
/// format is in host memory.
#[pyfunction]
#[pyo3(signature = (source, dtype, shape, strides, codebook, nonfinite, out, status, scales, sums, stream))]
#[allow(clippy::too_many_arguments)] // a strided tensor is four of them, the workspace three
fn cuda_quantize(
    py: Python<'_>,
    source: usize,
    dtype: &str,
    shape: [usize; 3],
    strides: [isize; 3],
    codebook: Option<Buffer>,
    nonfinite: &str,
    out: &CudaWeight,
    status: Buffer,
    scales: Option<Buffer>,
    sums: Option<Buffer>,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let source = DeviceSource { address: source as u64, dtype: Dtype::parse("tensor", dtype)?, shape, strides };
        let refuses = match nonfinite {
            "error" => true,
            "propagate" => false,
            _ => return Err(Error::invalid("nonfinite", format!("{nonfinite:?}"), "\"error\" or \"propagate\"")),
        };
        let workspace = Workspace { status: buffer(status), scales: scales.map(buffer), sums: sums.map(buffer) };
        // SAFETY: the caller lends the table, in host memory, for this call.
        let table = codebook.map(|codebook| unsafe { slice(codebook) }).transpose()?;
        // SAFETY: the caller's tensors are on the device of `out`, and torch keeps their memory until the stream is done.
        unsafe { cuda::quantize(out.queue(stream)?, &source, &out.weight, table, refuses, workspace) }
    })
}

/// Unpacks rows x cols of the weight, from (`first_row`, `first_col`) on, into `out`.
#[pyfunction]
fn cuda_dequantize(
    py: Python<'_>,
    weight: &CudaWeight,
    window: (usize, usize, usize, usize),
    out: FloatBuffer,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let (first_row, first_col, rows, cols) = window;
        let window = Window { first_row, first_col, rows, cols };
        // SAFETY: the caller's tensors are on the weight's device, and torch keeps their memory until the stream is done.
        unsafe { cuda::dequantize(weight.queue(stream)?, &weight.weight, window, floats("out", &out)?) }
    })
}

/// Unpacks the rows at the int64 indices `rows` into `out`, [len(rows), cols].
#[pyfunction]
fn cuda_dequantize_rows(
    py: Python<'_>,
    weight: &CudaWeight,
    rows: Buffer,
    out: FloatBuffer,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        // SAFETY: as for `cuda_dequantize`.
        unsafe { cuda::dequantize_rows(weight.queue(stream)?, &weight.weight, buffer(rows), floats("out", &out)?) }
    })
}

/// `out[tokens, rows] = x[tokens, cols] @ weight.T + bias`, rows of x `x_row_stride` elements apart. With `may_overlap`, the
/// weight may be read before the kernel in front in the stream has ended.
#[pyfunction]
#[pyo3(signature = (weight, x, tokens, x_row_stride, bias, out, stream, may_overlap))]
#[allow(clippy::too_many_arguments)] // three tensors with their strides
fn cuda_linear(
    py: Python<'_>,
    weight: &CudaWeight,
    x: FloatBuffer,
    tokens: usize,
    x_row_stride: usize,
    bias: Option<FloatBuffer>,
    out: FloatBuffer,
    stream: usize,
    may_overlap: bool,
) -> PyResult<()> {
    run(py, || {
        let x = DeviceActivations { values: floats("x", &x)?, tokens, stride: x_row_stride };
        let bias = optional_floats("bias", bias.as_ref())?;
        // SAFETY: as for `cuda_dequantize`.
        unsafe {
            let queue = Queue { may_overlap, ..weight.queue(stream)? };
            cuda::linear(queue, &weight.weight, x, bias, floats("out", &out)?)
        }
    })
}

/// Codes from one row of int8 activations to the next, and the int32 that tell of their outliers.
#[pyfunction]
fn cuda_int8_sizes(cols: usize) -> (usize, usize) {
    (cuda::codes_stride(cols), cuda::outlier_words(cols))
}

/// Rows in int8: codes, scales, and what tells of outliers.
pub(crate) type RowBuffers = (Buffer, Buffer, Option<Buffer>);

pub(crate) fn device_rows((codes, scales, outliers): RowBuffers) -> DeviceRows {
    DeviceRows { codes: buffer(codes), scales: buffer(scales), outliers: outliers.map(buffer) }
}

/// Rounds rows of x, `x_row_stride` elements apart, to int8, but for numbers of a magnitude of `threshold` or more.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the rows and their stride
fn cuda_round_rows(
    py: Python<'_>,
    device: usize,
    x: FloatBuffer,
    shape: (usize, usize),
    x_row_stride: usize,
    threshold: f32,
    rows: RowBuffers,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let (tokens, cols) = shape;
        let x = DeviceActivations { values: floats("x", &x)?, tokens, stride: x_row_stride };
        let queue = Queue { device: Device::get(device)?, stream, may_overlap: false };
        // SAFETY: as for `cuda_dequantize`.
        unsafe { cuda::round_rows(queue, x, cols, threshold, device_rows(rows)) }
    })
}

/// `out[tokens, rows] = x[tokens, cols] @ weight.T + bias` with x in int8 as `rows` has it, but for columns of outliers. With
/// a `workspace`, as `cuda_linear_batch` has it, x is multiplied as it is where there are too many of them.
#[pyfunction]
#[pyo3(signature = (weight, x, tokens, x_row_stride, rows, side, bias, out, workspace, stream))]
#[allow(clippy::too_many_arguments)] // four tensors with their strides
fn cuda_linear_int8(
    py: Python<'_>,
    weight: &CudaWeight,
    x: FloatBuffer,
    tokens: usize,
    x_row_stride: usize,
    rows: RowBuffers,
    side: Option<Buffer>,
    bias: Option<FloatBuffer>,
    out: FloatBuffer,
    workspace: Option<(Buffer, Buffer)>,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let x = DeviceActivations { values: floats("x", &x)?, tokens, stride: x_row_stride };
        let bias = optional_floats("bias", bias.as_ref())?;
        let workspace = workspace
            .map(|(partials, arrivals)| BatchWorkspace { partials: buffer(partials), arrivals: buffer(arrivals) });
        let (rows, side, out) = (device_rows(rows), side.map(buffer), floats("out", &out)?);
        // SAFETY: as for `cuda_dequantize`.
        unsafe { cuda::linear_int8(weight.queue(stream)?, &weight.weight, (x, rows), side, bias, out, workspace) }
    })
}

/// From how many tokens on activations are rounded to int8 before a product with this weight, `is_choosy` from where that
/// pays; Unsupported where never.
#[pyfunction]
fn cuda_rounded_from(weight: &CudaWeight, is_choosy: bool) -> PyResult<usize> {
    cuda::rounded_from(weight.device, &weight.weight, is_choosy).map_err(|error| to_python(&error))
}

/// Float32 and int32 elements that `cuda_linear_batch` needs as a workspace. None where no kernel takes the operands, and,
/// unless `even_if_slower`, where unpacking the weight takes less time.
#[pyfunction]
#[pyo3(signature = (weight, x, tokens, x_row_stride, even_if_slower=false))]
fn cuda_batch_sizes(
    py: Python<'_>,
    weight: &CudaWeight,
    x: FloatBuffer,
    tokens: usize,
    x_row_stride: usize,
    even_if_slower: bool,
) -> PyResult<Option<(usize, usize)>> {
    let sizes = run(py, || {
        let x = DeviceActivations { values: floats("x", &x)?, tokens, stride: x_row_stride };
        Ok(cuda::batch_sizes(Device::get(weight.device)?, &weight.weight, &x))
    })?;
    let taken = sizes.filter(|&(_, is_faster)| is_faster || even_if_slower);
    Ok(taken.map(|(sizes, _)| (sizes.partials, sizes.arrivals)))
}

/// As `cuda_linear`, for more tokens. The workspace is float32 and int32; the latter are 0 before and after.
#[pyfunction]
#[pyo3(signature = (weight, x, tokens, x_row_stride, bias, out, partials, arrivals, stream))]
#[allow(clippy::too_many_arguments)] // three tensors with their strides, and a workspace
fn cuda_linear_batch(
    py: Python<'_>,
    weight: &CudaWeight,
    x: FloatBuffer,
    tokens: usize,
    x_row_stride: usize,
    bias: Option<FloatBuffer>,
    out: FloatBuffer,
    partials: Buffer,
    arrivals: Buffer,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let x = DeviceActivations { values: floats("x", &x)?, tokens, stride: x_row_stride };
        let bias = optional_floats("bias", bias.as_ref())?;
        let workspace = BatchWorkspace { partials: buffer(partials), arrivals: buffer(arrivals) };
        // SAFETY: as for `cuda_dequantize`.
        unsafe {
            cuda::linear_batch(weight.queue(stream)?, &weight.weight, x, bias, floats("out", &out)?, workspace, None)
        }
    })
}

/// `out[r] = x[r] @ weight[e].T` for rows sorted by expert e, `counts` of them each, in a stack of `experts` matrices; rows
/// beyond become zero. False, with nothing done, where there is no kernel for this.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // three tensors with their strides
fn cuda_linear_grouped(
    py: Python<'_>,
    weight: &CudaWeight,
    experts: usize,
    x: FloatBuffer,
    tokens: usize,
    x_row_stride: usize,
    counts: Buffer,
    out: FloatBuffer,
    stream: usize,
) -> PyResult<bool> {
    run(py, || {
        let x = DeviceActivations { values: floats("x", &x)?, tokens, stride: x_row_stride };
        let (queue, out) = (weight.queue(stream)?, floats("out", &out)?);
        // SAFETY: as for `cuda_dequantize`.
        unsafe { cuda::linear_grouped(queue, &weight.weight, experts, x, buffer(counts), out) }
    })
}
