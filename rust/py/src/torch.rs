//! What a quick call has to know of torch: who watches the calls of a thread, and where tensors lie.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyTuple};

use crate::exchange::{Exchange, Memory, Place};

/// torch's functions, as `lowbit_rs.functional` has handed them over.
pub(crate) struct Torch {
    pub(crate) exchange: Exchange,
    plain_types: Vec<Py<PyAny>>,
    plain_keys: u64,
    included_keys: Py<PyAny>,
    function_modes: Py<PyAny>,
    is_grad_enabled: Py<PyAny>,
    is_autocast_enabled: Py<PyAny>,
    num_threads: Py<PyAny>,
    allocators: [Option<Py<PyAny>>; 2],
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// Hands over torch's functions: its table of C functions, the types whose values are those in their memory, the dispatch
/// keys that are always on for a thread and the function that tells those which are, the number of function modes, whether
/// gradients are recorded, whether autocast is on, the number of threads, and the functions that make tensors of a shape,
/// strides and a dtype on the CPU and on the current CUDA device, where it has them.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // one for each question
pub(crate) fn use_torch(
    exchange: Bound<'_, PyCapsule>,
    plain_types: Vec<Py<PyAny>>,
    plain_keys: u64,
    included_keys: Py<PyAny>,
    function_modes: Py<PyAny>,
    is_grad_enabled: Py<PyAny>,
    is_autocast_enabled: Py<PyAny>,
    num_threads: Py<PyAny>,
    allocators: [Option<Py<PyAny>>; 2],
) -> PyResult<()> {
    let py = exchange.py();
    if let Some(exchange) = Exchange::of_capsule(&exchange)? {
        let torch = Torch {
            exchange,
            plain_types,
            plain_keys,
            included_keys,
            function_modes,
            is_grad_enabled,
            is_autocast_enabled,
            num_threads,
            allocators,
        };
        drop(TORCH.set(py, torch)); // the first one stays
    }
    Ok(())
}

impl Torch {
    /// What was handed over; None where this torch has no table of C functions.
    pub(crate) fn get(py: Python<'_>) -> Option<&'static Self> {
        TORCH.get(py)
    }

    /// Whether a product of these is nothing but the product: nobody traces, watches, differentiates or casts it.
    pub(crate) fn is_plain_call(&self, x: &Bound<'_, PyAny>, bias: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let py = x.py();
        let is_on = |function: &Py<PyAny>| function.bind(py).call0()?.is_truthy();
        let with_grad = is_on(&self.is_grad_enabled)?;
        for tensor in std::iter::once(x).chain(bias) {
            if !self.is_plain(tensor)? || (with_grad && tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()?) {
                return Ok(false);
            }
        }
        let keys: u64 = self.included_keys.bind(py).call0()?.call_method0(intern!(py, "raw_repr"))?.extract()?;
        Ok(keys & !self.plain_keys == 0 && !is_on(&self.function_modes)? && !is_on(&self.is_autocast_enabled)?)
    }

    /// Whether a tensor's values are those in its memory: neither a subclass nor a lazy negation.
    fn is_plain(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let kind = tensor.get_type();
        let is_known = self.plain_types.iter().any(|plain| kind.is(plain));
        Ok(is_known && !tensor.call_method0(intern!(tensor.py(), "is_neg"))?.is_truthy()?)
    }

    /// A dense tensor of `shape` that nobody else has, on the device and of the dtype of `like`, and where it lies.
    ///
    /// `Tensor.new_empty` takes three times as long as torch's allocators for compiled code, which do not know other
    /// devices than the current one.
    pub(crate) fn empty<'py>(
        &self,
        like: &Bound<'py, PyAny>,
        place: Place,
        shape: &[i64],
    ) -> PyResult<Option<(Bound<'py, PyAny>, Memory)>> {
        let py = like.py();
        let mut found = Vec::with_capacity(shape.len());
        let size = PyTuple::new(py, shape)?;
        if let Some(allocate) = &self.allocators[usize::from(place.is_cuda())] {
            let mut strides = vec![1; shape.len()];
            for axis in (1..shape.len()).rev() {
                strides[axis - 1] = strides[axis] * shape[axis].max(1);
            }
            let dtype = like.getattr(intern!(py, "dtype"))?;
            let out = allocate.bind(py).call1((&size, PyTuple::new(py, &strides)?, dtype))?;
            let memory = self.exchange.read(&out, &mut found).filter(|memory| memory.place == place);
            if let Some(memory) = memory {
                return Ok(Some((out, memory)));
            }
        }
        let out = like.call_method1(intern!(py, "new_empty"), (size,))?;
        Ok(self.exchange.read(&out, &mut found).map(|memory| (out, memory)))
    }

    /// The number of threads for work on the CPU.
    pub(crate) fn threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.num_threads.bind(py).call0()?.extract()
    }
}
