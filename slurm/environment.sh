# Read by sweep.sbatch on the compute node, before it starts `lminf`. Keep what your cluster needs; the file may stay as
# it is where `lminf` is on the PATH of the shell that submits. LMINF_ENVIRONMENT names another file in its place.

# Modules:
# module load cuda/12.4 python/3.11

# A conda environment, or a virtual one:
# source "$HOME/miniforge3/etc/profile.d/conda.sh" && conda activate lminf
# source "$HOME/lminf/bin/activate"

# A container, with what `lminf` reads and writes bound into it:
# launch=(apptainer exec --nv --bind /scratch "$HOME/lminf.sif")

# Compute nodes without a network: models and data come from the cache, which a login node filled.
# export HF_HOME=/scratch/$USER/huggingface
# export HF_HUB_OFFLINE=1
