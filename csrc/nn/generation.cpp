#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <mamba_ssm/generation.h>
#include <mamba_ssm/nn/model.h>
#include <mamba_ssm/version.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "parts.h"

// Graphs of any accelerator, without a header of CUDA; torch 2.11, for one, has none.
#if __has_include(<ATen/accelerator/Graph.h>)
#define MAMBA_SSM_HAVE_GRAPHS
#include <ATen/accelerator/Graph.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#endif

namespace mamba_ssm {
namespace {

using at::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_sampling(int64_t top_k, double top_p, double min_p, double temperature) {
  TORCH_CHECK(top_p <= 1, "sample: top_p must be at most 1, got ", top_p);
  TORCH_CHECK(min_p <= 1, "sample: min_p must be at most 1, got ", min_p);
  TORCH_CHECK(top_k == 1 || temperature > 0, "sample: temperature must be positive, got ",
              temperature, "; top_k=1 is greedy");
}

/// Longest and shortest prompt of the batch.
std::pair<int64_t, int64_t> check_prompts(const Tensor& input_ids,
                                          const std::optional<Tensor>& lengths) {
  TORCH_CHECK(input_ids.dim() == 2 && input_ids.size(1) > 0,
              "generate: input_ids must have shape (batch, seqlen) with at least one token, got ",
              input_ids.sizes());
  const int64_t batch = input_ids.size(0), seqlen = input_ids.size(1);
  if (!lengths || batch == 0) return {seqlen, seqlen};
  TORCH_CHECK(lengths->sizes() == at::IntArrayRef(batch),
              "generate: lengths must have shape (batch) = ", at::IntArrayRef(batch), ", got ",
              lengths->sizes());
  const auto longest = lengths->max().item<int64_t>(), shortest = lengths->min().item<int64_t>();
  TORCH_CHECK(shortest >= 1 && longest <= seqlen,
              "generate: lengths must be from 1 to seqlen = ", seqlen, ", got ", shortest, " to ",
              longest);
  return {longest, shortest};
}

void check_options(const GenerateOptions& options) {
  check_sampling(options.top_k(), options.top_p(), options.min_p(), options.temperature());
  TORCH_CHECK(options.repetition_penalty() > 0,
              "generate: repetition_penalty must be positive, got ", options.repetition_penalty());
  TORCH_CHECK(options.prefill_chunk_size().value_or(1) > 0,
              "generate: prefill_chunk_size must be positive, got ",
              options.prefill_chunk_size().value_or(1));
}

/// A step of the model as one graph of the GPU, which is launched at once instead of kernel by
/// kernel.
class StepGraph {
 public:
  using Step = std::function<Tensor(const Tensor&)>;

  /// Captures step(tokens) for tokens of the shape of `example`; it runs once before, so that
  /// the contents of the states it updates are lost. It must keep to the memory of those.
  StepGraph(const Step& step, const Tensor& example) : tokens_(at::zeros_like(example)) {
#ifdef MAMBA_SSM_HAVE_GRAPHS
    const c10::impl::VirtualGuardImpl backend(tokens_.device().type());
    const c10::Stream current = backend.getStream(tokens_.device());
    const c10::Stream side = backend.getStreamFromGlobalPool(tokens_.device());
    wait(side, current);
    {
      const c10::StreamGuard guard(side);
      step(tokens_);  // what libraries set up at a first call cannot be captured
      // Other threads go on using the GPU meanwhile.
      graph_.capture_begin(/*pool=*/{0, 0}, at::GraphCaptureMode::ThreadLocal);
      logits_ = step(tokens_);
      graph_.capture_end();
    }
    wait(current, side);
#else
    TORCH_CHECK(false, "generate: cg needs torch 2.13 or newer, built with torch ",
                MAMBA_SSM_TORCH_VERSION);
#endif
  }

  /// The logits that `step` would return; the next call overwrites them.
  Tensor run(const Tensor& tokens) {
    tokens_.copy_(tokens);
#ifdef MAMBA_SSM_HAVE_GRAPHS
    graph_.replay();
#endif
    return logits_;
  }

 private:
  Tensor tokens_, logits_;
#ifdef MAMBA_SSM_HAVE_GRAPHS
  static void wait(const c10::Stream& waiting, const c10::Stream& other) {
    c10::Event event(other.device_type());
    event.record(other);
    waiting.wait(event);
  }

  at::accelerator::Graph graph_;
#endif
};

}  // namespace

void modify_logits_for_min_p_filtering(const Tensor& logits, double min_p) {
  if (!(0 < min_p && min_p <= 1)) return;
  // p_i >= min_p * p_max, in logits: the normalization drops out.
  const Tensor values = to_accumulate_type(logits);
  const Tensor threshold = values.amax(-1, /*keepdim=*/true) + std::log(min_p);
  logits.masked_fill_(values < threshold, -kInfinity);
}

void modify_logits_for_top_k_filtering(const Tensor& logits, int64_t top_k) {
  if (top_k <= 0) return;
  const int64_t count = std::min(top_k, logits.size(-1));
  const Tensor threshold = std::get<0>(logits.topk(count, -1)).narrow(-1, count - 1, 1);
  logits.masked_fill_(logits < threshold, -kInfinity);
}

void modify_logits_for_top_p_filtering(const Tensor& logits, double top_p) {
  if (!(0 < top_p && top_p < 1)) return;
  const auto [values, tokens] = logits.sort(/*stable=*/true, -1, /*descending=*/true);
  const Tensor probabilities = values.to(at::kDouble).softmax(-1);
  const Tensor before = probabilities.cumsum(-1) - probabilities;  // of all more probable tokens
  const Tensor removed = at::empty(before.sizes(), before.options().dtype(at::kBool))
                             .scatter_(-1, tokens, before >= top_p);
  logits.masked_fill_(removed, -kInfinity);
}

Tensor modify_logit_for_repetition_penalty(const Tensor& logits, const Tensor& prev_output_tokens,
                                           double repetition_penalty) {
  if (repetition_penalty == 1) return logits;
  const Tensor seen = logits.gather(1, prev_output_tokens);
  const Tensor penalized =
      at::where(seen < 0, seen * repetition_penalty, seen / repetition_penalty);
  return logits.scatter_(1, prev_output_tokens, penalized);
}

Tensor sample(const Tensor& logits, int64_t top_k, double top_p, double min_p, double temperature,
              const std::optional<at::Generator>& generator) {
  check_sampling(top_k, top_p, min_p, temperature);
  if (top_k == 1) return logits.argmax(-1);
  Tensor values = to_accumulate_type(logits) / temperature;
  Tensor tokens;
  if (0 < top_k && top_k < values.size(-1)) std::tie(values, tokens) = values.topk(top_k, -1);
  modify_logits_for_top_p_filtering(values, top_p);
  modify_logits_for_min_p_filtering(values, min_p);
  const Tensor cumulative = values.softmax(-1).cumsum(-1, at::kDouble);
  const Tensor total = cumulative.narrow(-1, cumulative.size(-1) - 1, 1);
  const Tensor u = at::rand(total.sizes(), generator, total.options());
  // u <= 1 - 2^-53, so that u * total rounds to less than the total: never behind the last token
  // that has a probability.
  const Tensor index = at::searchsorted(cumulative, u * total, /*out_int32=*/false, /*right=*/true);
  return (tokens.defined() ? tokens.gather(-1, index) : index).squeeze(-1);
}

void load_kernels(const Tensor& weight) {
  if (!weight.is_cuda()) return;
  const c10::InferenceMode inference;
  const c10::DeviceGuard device(weight.device());
  const Tensor ids = at::zeros({1, 2}, weight.options().dtype(at::kLong));
  const Tensor logits = at::zeros({1, weight.size(0)}, weight.options());
  try {
    at::linear(weight.slice(0, 0, 256), weight.slice(0, 0, 4096));  // as in a prompt
    at::linear(weight.slice(0, 0, 1), weight);                      // as in a step
    // As the embedding of one token.
    weight.gather(0, ids.narrow(1, 0, 1).expand({1, weight.size(1)}));
    const Tensor is_prompt = at::arange(2, ids.options()) < at::full({1, 1}, 2, ids.options());
    at::cat({at::where(is_prompt, ids, ids), ids}, 1);
    sample(logits);
    const at::Generator generator = at::globalContext()
                                        .getAcceleratorHooksInterface(weight.device().type())
                                        .getNewGenerator(weight.device().index());
    sample(logits, /*top_k=*/0, /*top_p=*/0.9, /*min_p=*/0, /*temperature=*/1, generator);
    sample(modify_logit_for_repetition_penalty(logits, ids, 1.1), /*top_k=*/50, /*top_p=*/0.9,
           /*min_p=*/0.1, /*temperature=*/1, generator);
  } catch (const c10::Error&) {
    // What cannot run here, for want of memory or of a deterministic algorithm, is reported where
    // it is called for.
  }
}

Tensor MambaLMHeadModelImpl::generate(const Tensor& input_ids, const GenerateOptions& options) {
  const auto [longest, shortest] = check_prompts(input_ids, options.lengths());
  check_options(options);
  const c10::InferenceMode inference;
  const c10::DeviceGuard device(input_ids.device());
  const int64_t batch = input_ids.size(0), max_length = options.max_length();
  const auto eos = options.eos_token_id();
  const int64_t pad = options.pad_token_id().value_or(eos.value_or(0));
  const at::TensorOptions index = input_ids.options().dtype(at::kLong);
  const bool ragged = shortest < longest;
  const Tensor ends = ragged ? options.lengths()->to(index).unsqueeze(1)  // (batch, 1)
                             : at::full({batch, 1}, longest, index);
  const Tensor is_prompt = at::arange(longest, index) < ends;
  // What is not a prompt need not even be a token.
  const Tensor prompt = at::where(is_prompt, input_ids.narrow(1, 0, longest).to(at::kLong),
                                  input_ids.narrow(1, 0, 1).to(at::kLong));

  auto states =
      allocate_inference_cache(batch, max_length, /*dtype=*/std::nullopt, options.state_dtype());
  std::optional<StepGraph> graph;
  if (options.cg() && input_ids.is_cuda() && max_length > shortest) {
    const auto eager_step = [&](const Tensor& tokens) { return forward(tokens, &states); };
    graph.emplace(eager_step, prompt.narrow(1, 0, 1));
    for (const MambaState& state : states) {  // nothing seen yet
      state.conv_state.zero_();
      state.ssm_state.zero_();
    }
  }
  const auto step = [&](const Tensor& tokens) {
    return graph ? graph->run(tokens) : forward(tokens, &states);
  };
  const auto prefill = [&](const Tensor& tokens, const std::optional<Tensor>& seq_idx) {
    const int64_t seqlen = tokens.size(1);
    const int64_t chunk_size = options.prefill_chunk_size().value_or(seqlen);
    Tensor logits;
    for (int64_t start = 0; start < seqlen; start += chunk_size) {
      const auto piece = [&](const Tensor& t) { return t.slice(1, start, start + chunk_size); };
      logits = forward(piece(tokens), &states, /*num_last_tokens=*/1,
                       seq_idx ? std::optional<Tensor>(piece(*seq_idx)) : std::nullopt);
    }
    return logits;
  };
  const auto first_logits = [&] {
    if (!ragged) return prefill(prompt, std::nullopt);
    // The last token of each prompt is a step, since its logits are in different columns.
    const Tensor seq_idx = is_prompt.slice(1, 1).to(at::kInt) - 1;  // -1 at padding
    prefill(prompt.slice(1, 0, longest - 1), seq_idx);
    return step(prompt.gather(1, ends - 1));
  };

  Tensor seen = prompt;                  // with padding that repeats a token of the row
  Tensor finished = ends >= max_length;  // (batch, 1)
  Tensor counts = at::zeros_like(ends);  // new tokens of each row
  std::vector<Tensor> sequences = {prompt};
  Tensor tokens;  // (batch, 1), the last ones
  for (int64_t i = 0; i < max_length - shortest; ++i) {
    if (options.should_stop() && options.should_stop()()) break;
    Tensor logits = i == 0 ? first_logits() : step(tokens);
    logits = logits.select(1, 0).slice(-1, 0, options.vocab_size());  // (batch, vocab)
    if (options.repetition_penalty() != 1) {
      logits =
          modify_logit_for_repetition_penalty(logits.clone(), seen, options.repetition_penalty());
    }
    tokens = sample(logits, options.top_k(), options.top_p(), options.min_p(),
                    options.temperature(), options.generator())
                 .unsqueeze(1);
    if (options.repetition_penalty() != 1) seen = at::cat({seen, tokens}, 1);
    sequences.push_back(tokens);
    if (ragged || eos) {
      sequences.back() = tokens.masked_fill(finished, pad);
      counts = counts + finished.logical_not();
      finished = finished | (ends + (i + 1) >= max_length);
      if (eos) finished = finished | (tokens == *eos);
    }
    if (options.on_tokens()) options.on_tokens()(sequences.back().to(at::kCPU));
    if (eos && finished.all().item<bool>()) break;
  }
  Tensor result = at::cat(sequences, 1);
  if (ragged) {  // each row's new tokens directly behind its prompt
    const int64_t steps = result.size(1) - longest;
    const Tensor placed =
        at::constant_pad_nd(prompt.masked_fill(is_prompt.logical_not(), pad), {0, steps}, pad);
    placed.scatter_(1, ends + at::arange(steps, index), result.narrow(1, longest, steps));
    result = placed.narrow(1, 0, (ends + counts).max().item<int64_t>());
  }
  const c10::InferenceMode no_inference(false);
  return result.clone();  // a tensor that a model may also be trained with
}

}  // namespace mamba_ssm
