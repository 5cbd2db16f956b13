//! `RMSNorm` and `LayerNorm`, on the CPU and on CUDA devices.

use lowbit_core::Result;
use lowbit_core::cpu::{self, Activations, Affine, Residual};
use lowbit_core::cuda::{self, Device, DeviceActivations, DeviceAffine, DeviceGradient, DeviceResidual, Queue};
use lowbit_core::dtype::Dtype;
use lowbit_core::norm::Norm;
use pyo3::prelude::*;

use crate::buffers::{FloatBuffer, floats, floats_mut};
use crate::cuda::{RowBuffers, device_rows, floats as device_floats, optional_floats};
use crate::errors::run;
use crate::operations::activations;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(norm, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_norm, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_norm_sum_lines, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_norm_backward, module)?)
}

/// eps, whether the mean is subtracted, whether the factor is 1 + weight, whether normalized numbers are rounded before
/// they are multiplied by it.
type Kind = (f32, bool, bool, bool);

fn norm_of((eps, is_centered, has_unit_offset, rounds_normalized): Kind) -> Norm {
    Norm { eps, is_centered, has_unit_offset, rounds_normalized }
}

/// Rows and the elements from one to the next.
type Rows = (FloatBuffer, usize);

/// `out[tokens, cols]` = the normalized rows of x, or of `total = x + residual` where the two are given.
#[pyfunction]
#[pyo3(signature = (kind, x, tokens, cols, residual, total, weight, bias, out, threads))]
#[allow(clippy::too_many_arguments)] // six tensors
fn norm(
    py: Python<'_>,
    kind: Kind,
    x: Rows,
    tokens: usize,
    cols: usize,
    residual: Option<Rows>,
    total: Option<FloatBuffer>,
    weight: Option<FloatBuffer>,
    bias: Option<FloatBuffer>,
    out: FloatBuffer,
    threads: usize,
) -> PyResult<()> {
    run(py, || {
        let rows = |argument, (buffer, stride): &Rows| -> lowbit_core::Result<Activations<'_>> {
            // SAFETY: the caller lends its tensors for this call.
            unsafe { activations(argument, buffer, tokens, *stride) }
        };
        let column = |argument, buffer: Option<FloatBuffer>| {
            let read = |(address, len, dtype): FloatBuffer| {
                // SAFETY: as above.
                Dtype::parse(argument, &dtype).and_then(|dtype| unsafe { floats((address, len), dtype) })
            };
            buffer.map(read).transpose()
        };
        let written = |argument, (address, len, dtype): FloatBuffer| {
            // SAFETY: as above; nobody else uses what is written.
            Dtype::parse(argument, &dtype).and_then(|dtype| unsafe { floats_mut((address, len), dtype) })
        };
        let residual = match (&residual, total) {
            (Some(residual), Some(total)) => {
                Some(Residual { rows: rows("residual", residual)?, total: written("total", total)? })
            }
            _ => None,
        };
        let affine = Affine { weight: column("weight", weight)?, bias: column("bias", bias)? };
        cpu::norm(norm_of(kind), cols, rows("x", &x)?, residual, affine, written("out", out)?, threads)
    })
}

fn device_rows_at(argument: &'static str, (buffer, stride): &Rows, tokens: usize) -> Result<DeviceActivations> {
    Ok(DeviceActivations { values: device_floats(argument, buffer)?, tokens, stride: *stride })
}

/// As `norm`, of tensors on the device of this number; with a threshold and buffers for rows in int8, the result goes there
/// too, as `cuda_round_rows` rounds it.
#[pyfunction]
#[pyo3(signature = (device, kind, x, tokens, cols, residual, total, weight, bias, out, rounded, stream))]
#[allow(clippy::too_many_arguments)] // six tensors
fn cuda_norm(
    py: Python<'_>,
    device: usize,
    kind: Kind,
    x: Rows,
    tokens: usize,
    cols: usize,
    residual: Option<Rows>,
    total: Option<FloatBuffer>,
    weight: Option<FloatBuffer>,
    bias: Option<FloatBuffer>,
    out: FloatBuffer,
    rounded: Option<(f32, RowBuffers)>,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let rows = |argument, rows| device_rows_at(argument, rows, tokens);
        let residual = match (&residual, &total) {
            (Some(residual), Some(total)) => {
                Some(DeviceResidual { rows: rows("residual", residual)?, total: device_floats("total", total)? })
            }
            _ => None,
        };
        let weight = optional_floats("weight", weight.as_ref())?;
        let affine = DeviceAffine { weight, bias: optional_floats("bias", bias.as_ref())? };
        let queue = Queue { device: Device::get(device)?, stream, may_overlap: false };
        let (x, out) = (rows("x", &x)?, device_floats("out", &out)?);
        let kind = norm_of(kind);
        // SAFETY: the caller's tensors are on the device, and torch keeps their memory until the stream is done.
        unsafe {
            match rounded {
                None => cuda::norm(queue, kind, cols, x, residual, affine, out),
                Some((threshold, rows)) => {
                    cuda::norm_rounded(queue, kind, cols, x, residual, affine, out, threshold, device_rows(rows))
                }
            }
        }
    })
}

/// Lines of the partial sums that `cuda_norm_backward` leaves for the gradients of weight and bias.
#[pyfunction]
fn cuda_norm_sum_lines(py: Python<'_>, device: usize, tokens: usize, cols: usize) -> PyResult<usize> {
    run(py, || Ok(cuda::norm_sum_lines(Device::get(device)?, tokens, cols)))
}

/// `out[tokens, cols]` = the gradient of `rows`, which were normalized as `kind` says, and sums over them for weight and
/// bias; `of_total` is added to the first.
#[pyfunction]
#[pyo3(signature = (device, kind, rows, grad, of_total, tokens, cols, weight, out, sums, stream))]
#[allow(clippy::too_many_arguments)] // six tensors
fn cuda_norm_backward(
    py: Python<'_>,
    device: usize,
    kind: Kind,
    rows: Rows,
    grad: Rows,
    of_total: Option<Rows>,
    tokens: usize,
    cols: usize,
    weight: Option<FloatBuffer>,
    out: Option<FloatBuffer>,
    sums: Option<FloatBuffer>,
    stream: usize,
) -> PyResult<()> {
    run(py, || {
        let gradient = DeviceGradient {
            rows: device_rows_at("rows", &rows, tokens)?,
            grad: device_rows_at("grad", &grad, tokens)?,
            of_total: of_total.as_ref().map(|rows| device_rows_at("grad_total", rows, tokens)).transpose()?,
            weight: optional_floats("weight", weight.as_ref())?,
            out: optional_floats("out", out.as_ref())?,
            sums: optional_floats("sums", sums.as_ref())?,
        };
        let queue = Queue { device: Device::get(device)?, stream, may_overlap: false };
        // SAFETY: the caller's tensors are on the device, and torch keeps their memory until the stream is done.
        unsafe { cuda::norm_backward(queue, norm_of(kind), cols, gradient) }
    })
}
