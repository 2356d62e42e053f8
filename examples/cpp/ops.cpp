// The operations as functions, without a module: each is an op of torch's dispatcher, runs on CPU
// and CUDA tensors and has gradients. mamba_ops [cpu | cuda] prints what it computes.
#include <ATen/Functions.h>
#include <mamba_ssm/ops.h>
#include <torch/utils.h>

#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "program.h"

namespace {

constexpr char kUsage[] = "mamba_ops [cpu | cuda]\n";

/// Raises std::runtime_error unless the tensors are equal but for rounding.
void expect_close(const std::string& what, const at::Tensor& a, const at::Tensor& b) {
  const auto difference = (a - b).abs().max().item<double>();
  std::cout << what << ": largest difference " << difference << "\n";
  if (!(difference < 1e-4)) throw std::runtime_error(what + ": too far apart");
}

/// A Mamba block's convolution and scan, backward through both, and the same in two pieces.
void mamba(const at::TensorOptions& options) {
  const int64_t batch = 2, dim = 8, dstate = 4, seqlen = 12, width = 4;
  const at::Tensor x = at::randn({batch, dim, seqlen}, options).requires_grad_();
  const at::Tensor weight = at::randn({dim, width}, options), delta = at::rand_like(x);
  const at::Tensor A = -at::rand({dim, dstate}, options);
  const at::Tensor B = at::randn({batch, dstate, seqlen}, options), C = at::randn_like(B);

  const auto [u, conv_state] =
      mamba_ssm::causal_conv1d(x, weight, /*bias=*/{}, /*seq_idx=*/{}, /*initial_states=*/{},
                               /*silu=*/true);
  const auto [y, last_state] = mamba_ssm::selective_scan(u, delta, A, B, C);
  y.sum().backward();
  std::cout << "selective_scan: out " << y.sizes() << ", state " << last_state.sizes()
            << ", gradient of x " << x.grad().sizes() << "\n";

  // States go from one piece to the next: a sequence may be given in pieces of any lengths.
  const at::NoGradGuard no_grad;
  at::Tensor state;
  std::vector<at::Tensor> pieces;
  for (int64_t begin : {0, 5}) {
    const auto piece = [&](const at::Tensor& t) {
      return t.slice(-1, begin, begin == 0 ? 5 : seqlen);
    };
    const auto initial = state.defined() ? std::optional<at::Tensor>(state) : std::nullopt;
    const auto [out, next] =
        mamba_ssm::selective_scan(piece(u), piece(delta), A, piece(B), piece(C), /*D=*/{}, /*z=*/{},
                                  /*delta_bias=*/{}, initial);
    pieces.push_back(out);
    state = next;
  }
  expect_close("one scan and two pieces of it", y, at::cat(pieces, -1));
}

/// Mamba-2's scan over two sequences that are packed into one row, and over the second alone.
void mamba2(const at::TensorOptions& options) {
  const int64_t seqlen = 10, nheads = 2, headdim = 4, dstate = 4;
  const at::Tensor x = at::randn({1, seqlen, nheads, headdim}, options);
  const at::Tensor dt = at::rand({1, seqlen, nheads}, options), A = -at::rand({nheads}, options);
  const at::Tensor B = at::randn({1, seqlen, /*ngroups=*/1, dstate}, options),
                   C = at::randn_like(B);
  const at::Tensor seq_idx =
      (at::arange(seqlen, options.dtype(at::kInt)) >= 6).to(at::kInt).unsqueeze(0);

  const at::Tensor packed =
      std::get<0>(mamba_ssm::ssd_chunk_scan(x, dt, A, B, C, /*D=*/{}, /*z=*/{}, /*dt_bias=*/{},
                                            /*initial_states=*/{}, seq_idx));
  const auto second = [](const at::Tensor& t) { return t.slice(1, 6); };
  const at::Tensor alone =
      std::get<0>(mamba_ssm::ssd_chunk_scan(second(x), second(dt), A, second(B), second(C)));
  expect_close("a packed sequence and the same alone", second(packed), alone);
}

int run(int argc, char** argv) {
  const Arguments arguments(argc, argv, {});
  if (arguments.words().size() > 1) throw std::invalid_argument("one device at most");
  const at::Device device(arguments.words().empty() ? "cpu" : arguments.words().front());
  at::manual_seed(0);
  mamba(at::TensorOptions(device));
  mamba2(at::TensorOptions(device));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(kUsage, [&] { return run(argc, argv); });
}
