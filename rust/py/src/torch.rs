//! What a quick call has to know of torch: who watches the calls of a thread, and where tensors lie.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyCapsule;

use crate::exchange::Exchange;

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
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// Hands over torch's functions: its table of C functions, the types whose values are those in their memory, the dispatch
/// keys that are always on for a thread and the function that tells those which are, the number of function modes, whether
/// gradients are recorded, whether autocast is on, and the number of threads.
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

    /// The number of threads for work on the CPU.
    pub(crate) fn threads(&self, py: Python<'_>) -> PyResult<usize> {
        self.num_threads.bind(py).call0()?.extract()
    }
}
