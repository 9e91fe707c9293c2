"""The methods as README.md and the documentation list them; report.py fills in the figures of their results."""

METHODS = {
    "ambient": {
        "title": "Ambient Diffusion",
        "papers": ["2411.02780", "2404.10177", "2506.10038"],
        "gives": "Train a model of clean images from noisy ones whose noise level is known, each its own.",
        "headline": (
            "Nine tenths of the digits noisy, one clean: {experiment[mix_over_clean]} times the Frechet distance that "
            "the clean tenth gives alone; all taken for clean, {experiment[naive_over_mix]} times the mix's."
        ),
    },
    "domain_studio": {
        "title": "DomainStudio",
        "papers": ["2306.14153"],
        "gives": "Adapt a model or a text-to-image pipeline to about ten images without ending in copies of the ten.",
        "headline": (
            "Samples stay {experiment[domain_studio_over_plain_intra_cluster_600]} times as diverse as after plain "
            "fine-tuning, at {experiment[domain_studio_over_plain_frechet_distance_600]} of its Frechet distance."
        ),
    },
    "forward_models": {
        "title": "Diffusion with forward models",
        "papers": ["2306.11719"],
        "gives": (
            "Learn a diffusion model of what was never observed directly, from crops, projections or pictures of it, "
            "and sample what agrees with one observation."
        ),
        "headline": (
            "One noisy row of 12 pixels of a digit gives digits at {experiment[energy_4_over_regression]:.2f} times "
            "the energy distance of regression's; none was ever seen whole."
        ),
    },
    "geometry": {
        "title": "Geometry of a trained model",
        "papers": ["2402.03845", "2212.12611", "2406.03537", "2206.14882", "2510.12975"],
        "gives": (
            "Measure any denoiser: at which noise it is a score, log-likelihood, and the dimension of the data around "
            "an image."
        ),
        "headline": (
            "{cost[dsm_least_calls]:.0f} calls an image tell a dimension of 8 among 64 to 1.5; the normal bundle's "
            "way takes {cost[normal_bundle_least_calls]:.0f}."
        ),
    },
    "immiscible": {
        "title": "Immiscible Diffusion",
        "papers": ["2406.12303", "2505.18521"],
        "gives": "Train on noise that lies near each image: one argument, nothing else changes.",
        "headline": (
            "Flow matching gets to plain training's 4-step quality in {digits8_flow[speedup_assignment]} times fewer "
            "training steps on 8x8 digits, in {digits28_flow[speedup_assignment]} times fewer on 28x28 ones."
        ),
    },
    "mmd_ddm": {
        "title": "MMD-DDM",
        "papers": ["2301.07969"],
        "gives": "Tune a pretrained model for 5 or 10 sampling steps, in minutes and without a teacher.",
        "headline": (
            "On digits, 5 steps after tuning are as good as 50 before: a Frechet distance of "
            "{experiment[fd_held_out_5_tuned_for_5_digits]} against "
            "{experiment[fd_held_out_50_untuned_digits]} (lower is better)."
        ),
    },
    "noise2score": {
        "title": "Noise2Score",
        "papers": ["2106.07009"],
        "gives": "Denoise images in one network call that learned from noisy images alone, one of each.",
        "headline": (
            "Photographs with Gaussian noise of 25/255: {experiment[gaussian_25_noisy]} dB become "
            "{experiment[gaussian_25_noise2score]} dB from one noisy copy; Noise2Noise, from two, reaches "
            "{experiment[gaussian_25_noise2noise]}, BM3D, which learns nothing, {experiment[gaussian_25_bm3d]}."
        ),
    },
    "noise_diffusion": {
        "title": "NoiseDiffusion",
        "papers": ["2403.08840"],
        "gives": "Make frames between two real photographs, noisy ones too. Nothing is trained.",
        "headline": (
            "Between noisy digits, {digits[out_of_range_noise_0.3_noise_diffusion]:.1%} of the pixels are out of "
            "range; with spherical interpolation it is {digits[out_of_range_noise_0.3_slerp]:.0%}."
        ),
    },
    "oms": {
        "title": "One More Step",
        "papers": ["2311.15744"],
        "gives": (
            "Let a finished model draw dark and bright images: a small network in front, the model stays as it is."
        ),
        "headline": (
            "Brightness of the samples is distributed {experiment[brightness_nearer_oms]} times nearer to that of "
            "real photographs."
        ),
    },
    "pnnp": {
        "title": "PNNP raw denoising",
        "papers": ["2310.09126"],
        "gives": "Learn a camera's noise from frames with the cap on, and denoise its raw images.",
        "headline": (
            "Noise learned from 24 frames an ISO is {proxy[over_gaussian_800]} times as far from the truth as a "
            "Gaussian, and wrong by {proxy[std_error_1130]:.1%} in deviation at an ISO without frames."
        ),
    },
    "q_diffusion": {
        "title": "Q-Diffusion",
        "papers": ["2302.04304"],
        "gives": "Load any pipeline's network in 4 or 8 bits, in an eighth or a quarter of the memory.",
        "headline": (
            "In 4 bits, {experiment[size_w4_photos]} of the memory: learned rounding leaves "
            "{experiment[adaround_over_nearest_photos]} times the error of rounding to nearest on photographs, "
            "{experiment[adaround_over_nearest_digits]} times on digits."
        ),
    },
    "score_frameworks": {
        "title": "One denoiser under three frameworks",
        "papers": ["2211.07804", "1907.05600", "2006.09011", "2011.13456", "2110.05243", "2212.00490"],
        "gives": (
            "Sample any denoiser as DDPM, NCSN or SDE by exchanging the scheduler; anomaly maps, and images from "
            "undersampled k-space. For research, not for diagnosis."
        ),
        "headline": (
            "A DDPM as a VE process: {frameworks[fd_ve_over_ddpm]} times DDPM's Frechet distance after 100 calls. "
            "Heads from 17 of 64 lines of k-space: {reconstruction[pigdm_mean_over_tv]:.1f} dB nearer than by total "
            "variation."
        ),
    },
    "sda": {
        "title": "SDA test-time adaptation",
        "papers": ["2406.04295", "2207.03442"],
        "gives": "Keep an image classifier right on noisy, blurred or torn images, one image at a time.",
        "headline": (
            "Over 15 corruptions of digits, {experiment[mean_source]:.0f}% right becomes "
            "{experiment[mean_sda]:.0f}%; batch statistics reach {experiment[mean_bn_shuffled]:.0f}% where whole "
            "shuffled batches are at hand."
        ),
    },
    "sgmse": {
        "title": "SGMSE+ speech enhancement",
        "papers": ["2208.05830", "2406.06185", "2409.10753"],
        "gives": "Take noise or reverberation from recordings of speech, of any length, rate and number of channels.",
        "headline": (
            "In noise of 0 to 5 dB, 5 calls of the network gain {experiment[noise_si_sdr_over_noisy]} dB of SI-SDR, "
            "{experiment[noise_si_sdr_over_pc_30]} dB more than 60 calls of the paper's sampler."
        ),
    },
}
