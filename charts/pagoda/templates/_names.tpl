{{/* Names and labels. */}}

{{- define "pagoda.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* Whole name of the objects: at most 50 characters, which leaves room for what Kubernetes appends to pods. */}}
{{- define "pagoda.fullname" -}}
{{- $name := include "pagoda.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.selectorLabels" -}}
app.kubernetes.io/name: {{ include "pagoda.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{/* Labels of pods: no versions, so that a new chart alone does not replace pods that took long to load. */}}
{{- define "pagoda.podLabels" -}}
{{- merge (include "pagoda.selectorLabels" . | fromYaml) .Values.extraLabels | toYaml -}}
{{- end -}}

{{/* Labels of every object. The chart's own win over extraLabels: selectors must hold. */}}
{{- define "pagoda.labels" -}}
{{- $own := dict
  "app.kubernetes.io/version" (.Chart.AppVersion | toString)
  "app.kubernetes.io/managed-by" .Release.Service
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- $own = merge (include "pagoda.selectorLabels" . | fromYaml) $own -}}
{{- merge $own .Values.extraLabels | toYaml -}}
{{- end -}}

{{- define "pagoda.serviceAccountName" -}}
{{- if .Values.security.serviceAccount.create -}}
{{- .Values.security.serviceAccount.name | default (include "pagoda.fullname" .) -}}
{{- else -}}
{{- .Values.security.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* `http` or `https`, as the server speaks it. */}}
{{- define "pagoda.scheme" -}}
{{- ternary "https" "http" (ne .Values.network.tls.secretName "") -}}
{{- end -}}

{{- define "pagoda.url" -}}
{{- printf "%s://%s:%d" (include "pagoda.scheme" .) (include "pagoda.fullname" .) (int .Values.network.httpPort) -}}
{{- end -}}
