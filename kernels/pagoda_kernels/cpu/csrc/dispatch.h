// Which kernels this processor can run, and which of them are in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pagoda {

// The kernels in use: the fastest on this processor, unless others were chosen. Not always the last of `available_levels`.
const Kernels& active_kernels();

// Names of the levels that this processor can run, by their instruction sets; empty where it can run none.
std::vector<std::string> available_levels();

// Let all operators use `level`. Returns false, and changes nothing, for one that is not available.
bool use_level(const std::string& level);

}  // namespace pagoda
